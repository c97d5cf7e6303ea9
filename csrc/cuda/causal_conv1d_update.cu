#include "cuda/causal_conv1d_device.h"

namespace ssmtune::cuda {
namespace {

// Elements of any dtype, for all this takes the time of its launch.
__device__ inline float load(const StridedTensor& x, int64_t i, int64_t j = 0, int64_t k = 0) {
  const int64_t offset = i * x.strides[0] + j * x.strides[1] + k * x.strides[2];
  switch (x.dtype) {
    case DType::kFloat32: return static_cast<const float*>(x.data)[offset];
    case DType::kBFloat16: return to_float(static_cast<const BFloat16*>(x.data)[offset]);
    default: return to_float(static_cast<const Float16*>(x.data)[offset]);
  }
}
__device__ inline void store(const StridedTensor& x, float value, int64_t i, int64_t j, int64_t k = 0) {
  const int64_t offset = i * x.strides[0] + j * x.strides[1] + k * x.strides[2];
  switch (x.dtype) {
    case DType::kFloat32: static_cast<float*>(x.data)[offset] = value; break;
    case DType::kBFloat16: static_cast<BFloat16*>(x.data)[offset] = from_float<BFloat16>(value); break;
    default: static_cast<Float16*>(x.data)[offset] = from_float<Float16>(value);
  }
}

__global__ void __launch_bounds__(kConvThreads) causal_conv1d_update_kernel(const CausalConv1dUpdate p) {
  const auto [row, channel] = RowAndChannel(p.dim);
  if (channel >= p.dim) return;
  float y = p.bias.data ? load(p.bias, channel) : 0.0f;
  for (int64_t k = 0; k < p.width; ++k) {
    const float step = k + 1 < p.width ? load(p.state, row, channel, k) : load(p.x, row, channel);
    y += load(p.weight, channel, k) * step;
    if (k > 0) store(p.state, step, row, channel, k - 1);
  }
  store(p.out, p.silu ? y * sigmoid(y) : y, row, channel);
}

}  // namespace

int causal_conv1d_update(const CausalConv1dUpdate& p, void* stream) {
  return launch(causal_conv1d_update_kernel, p.batch * row_blocks(p.dim), kConvThreads, 0, stream, p);
}

}  // namespace ssmtune::cuda
