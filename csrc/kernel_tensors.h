// How the kernels of every device see tensors. Free of torch: plain pointers, sizes and strides in elements.
#pragma once

#include <cstdint>

namespace ssmtune {

enum class DType : int32_t { kFloat32, kBFloat16, kFloat16 };

// A (batch, channels, time) tensor in which the channels or the steps lie next to each other; `stride` is that of the
// other axis. A null `data` stands for an argument that was not given, or a gradient that is not wanted.
struct SequenceTensor {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  bool channels_last = true;
  int64_t batch_stride = 0;
  int64_t stride = 0;
};

// B or C: a (batch, states, time) tensor for each group of channels, or one for all of them (group_stride 0).
struct StateTensor : SequenceTensor {
  int64_t group_stride = 0;
};

// A contiguous fp32 parameter of each channel, shared by the batch (batch_stride 0) or one for each row of it.
struct ChannelParameter {
  const float* data = nullptr;
  int64_t batch_stride = 0;

  const float* row(int64_t r) const { return data ? data + r * batch_stride : nullptr; }
};

}  // namespace ssmtune
