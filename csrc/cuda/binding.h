// What binds the CUDA kernels to torch, through its stable ABI: one binary for every torch from 2.10 on.
//
// The emulated build (SSMTUNE_EMULATED, tests/cuda) binds them to operators of their own, on the CPU.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "tensors.h"

#if defined(SSMTUNE_EMULATED)
#define SSMTUNE_CUDA_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(ssmtune_emulated, CPU, m)
#else
#define SSMTUNE_CUDA_IMPL(m) STABLE_TORCH_LIBRARY_IMPL(ssmtune_native, CUDA, m)
#endif

namespace ssmtune::cuda {

// The device of a call, which is the current one while this lives, and its current stream.
class Place {
 public:
  // Of tensors that must all lie on the device of the first.
  template <typename... Others>
  explicit Place(const Tensor& main, const Others&... others) : Place(main.get_device_index()) {
    (check(main, others), ...);
  }
  void* stream() const { return stream_; }

 private:
  explicit Place(int32_t device);
  static void check(const Tensor& main, const Tensor& other);
  static void check(const Tensor& main, const OptionalTensor& other) {
    if (other) check(main, *other);
  }

#if !defined(SSMTUNE_EMULATED)
  torch::stable::accelerator::DeviceGuard guard_;
#endif
  void* stream_ = nullptr;
};

// Raises what a launcher returned, if that is an error.
void check_launch(const char* op, int error);

// cu_seqlens, whose values are left alone, for to read them would wait for the GPU.
struct PackedSequences {
  // `rows`: sequences without any, which is the batch.
  PackedSequences(const char* op, const OptionalTensor& cu_seqlens, int64_t batch);

  const int64_t* bounds() const { return tensor ? static_cast<const int64_t*>(tensor->data_ptr()) : nullptr; }

  int64_t rows;
  OptionalTensor tensor;  // int64 and contiguous
};

}  // namespace ssmtune::cuda
