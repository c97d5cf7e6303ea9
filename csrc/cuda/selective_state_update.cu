#include "cuda/elements.h"
#include "cuda/selective_state_update.h"

namespace ssmtune::cuda {
namespace {

__device__ inline int64_t adapter_of(const AdapterIndex& index, int64_t row) {
  return index.wide ? static_cast<const int64_t*>(index.data)[row] : static_cast<const int32_t*>(index.data)[row];
}

template <typename T>
__device__ __forceinline__ const T* row_of(const Rows& x, int64_t row, int64_t group = 0) {
  return static_cast<const T*>(x.data) + row * x.stride + group * x.group_stride;
}

template <typename T, int kVector>
__global__ void __launch_bounds__(StateUpdateLayout::kThreads)
    selective_state_update_kernel(const SelectiveStateUpdate p, const StateUpdateLayout layout) {
  const int lane = static_cast<int>(threadIdx.x) % layout.lanes;
  const int64_t row = blockIdx.x / layout.channel_blocks;
  const unsigned channel = blockIdx.x % layout.channel_blocks * layout.block_channels + threadIdx.x / layout.lanes;
  const bool exists = channel < p.dim;

  // the offsets of this row, with one adapter or many
  int64_t entry = row;
  bool offset = true;
  if (p.adapter_index.data) {
    entry = adapter_of(p.adapter_index, row);
    offset = entry >= 0 && entry < p.adapter_index.adapters;
  }

  float x = 0, y = 0;
  if (exists) {
    x = to_float(row_of<T>(p.x, row)[channel]);
    float dt = to_float(row_of<T>(p.dt, row)[channel]) + (p.dt_bias ? p.dt_bias[channel] : 0.0f);
    if (p.dt_softplus) dt = softplus(dt);
    const int64_t group = p.groups == 1 ? 0 : channel / layout.group_channels;
    const T* const B = row_of<T>(p.B, row, group);
    const T* const C = row_of<T>(p.C, row, group);
    const float* const A = p.A + channel * p.dstate;
    float* const state = p.state + (row * p.dim + channel) * p.dstate;
    const float* const state_offset =
        p.state_offset.data && offset ? p.state_offset.data + entry * p.state_offset.batch_stride + channel * p.dstate : nullptr;
    const float rate = dt * kLog2e, input = dt * x;
    for (int64_t n = lane * kVector; n < p.dstate; n += layout.lanes * kVector) {
      auto h = load_vector<kVector>(state + n);
      const auto a = load_vector<kVector>(A + n);
      const auto b = load_vector<kVector>(B + n);
      const auto c = load_vector<kVector>(C + n);
      Vector<float, kVector> read = {};
      if (state_offset) read = load_vector<kVector>(state_offset + n);
#pragma unroll
      for (int v = 0; v < kVector; ++v) {
        h.data[v] = exp2_fast(rate * a[v]) * h[v] + input * b[v];
        y += c[v] * (h[v] + read[v]);
      }
      store_vector(state + n, h);
    }
  }
  for (int apart = layout.lanes / 2; apart > 0; apart /= 2) y += __shfl_xor_sync(kAllLanes, y, apart);
  if (!exists || lane > 0) return;
  if (p.D) y += p.D[channel] * x;
  if (p.output_offset.data && offset) y += p.output_offset.data[entry * p.output_offset.batch_stride + channel];
  if (p.z.data) {
    const float z = to_float(row_of<T>(p.z, row)[channel]);
    y *= z * sigmoid(z);
  }
  static_cast<T*>(p.out)[row * p.dim + channel] = from_float<T>(y);
}

}  // namespace

int selective_state_update(const SelectiveStateUpdate& p, void* stream) {
  const StateUpdateLayout cut = layout(p);
  return dispatch(p.dtype, [&](auto element) {
    using T = decltype(element);
    const auto kernel = cut.vector == 1 ? selective_state_update_kernel<T, 1> : selective_state_update_kernel<T, 4>;
    return launch(kernel, cut.blocks(), StateUpdateLayout::kThreads, 0, stream, p, cut);
  });
}

}  // namespace ssmtune::cuda
