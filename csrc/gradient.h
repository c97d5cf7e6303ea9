#pragma once

#include "cpu/buffer.h"
#include "tensors.h"

namespace ssmtune {

// The gradient of a parameter, shared or one for each of some rows: written by the kernel in place where each value has one
// writer, else added up over the groups of a partition by finish().
class Gradient {
 public:
  Gradient(const OptionalTensor& x, const char* name, const Partition& partition, int64_t rows, Shape shape)
      : groups_(partition.groups) {
    for (const int64_t size : shape) size_ *= size;
    if (!x) return;
    const bool shared = x->dim() == static_cast<int64_t>(shape.size());
    if (!shared) shape.insert(shape.begin(), rows);
    target_ = contiguous(*x, name, shape);
    row_stride_ = shared ? 0 : size_;
    if (shared && groups_ > 1) partial_ = allocate(groups_ * size_);
  }

  ChannelGradient get() { return {partial_ ? partial_.get() : target_, row_stride_, partial_ ? size_ : 0}; }

  void finish() const {
    if (!partial_) return;
    for (int64_t i = 0; i < size_; ++i) target_[i] = partial_[i];
    for (int64_t group = 1; group < groups_; ++group) {
      for (int64_t i = 0; i < size_; ++i) target_[i] += partial_[group * size_ + i];
    }
  }

 private:
  int64_t groups_, size_ = 1, row_stride_ = 0;
  float* target_ = nullptr;
  Buffer partial_;
};

}  // namespace ssmtune
