// What the kernels of the convolution share: its input, continued to the left, and its filters.
#pragma once

#include "cuda/causal_conv1d.h"
#include "cuda/elements.h"

namespace ssmtune::cuda {

// A row of the batch, or one of the sequences packed into the only one: the steps [begin, end).
struct Sequence {
  int64_t index, batch, begin, end;
};

__device__ inline Sequence sequence(const CausalConv1dParams& p, int64_t index) {
  if (!p.cu_seqlens) return {index, index, 0, p.seqlen};
  // nobody has read these values before: whatever is wrong with them, no step is outside of x
  const int64_t begin = min(max(p.cu_seqlens[index], int64_t{0}), p.seqlen);
  return {index, 0, begin, min(max(p.cu_seqlens[index + 1], begin), p.seqlen)};
}

// The sequence of one step.
__device__ inline Sequence sequence_at(const CausalConv1dParams& p, int64_t batch, int64_t step) {
  if (!p.cu_seqlens) return sequence(p, batch);
  int64_t first = 0, last = p.sequences - 1;
  while (first < last) {
    const int64_t middle = (first + last + 1) / 2;
    if (p.cu_seqlens[middle] <= step) {
      first = middle;
    } else {
      last = middle - 1;
    }
  }
  Sequence s = sequence(p, first);
  s.begin = min(s.begin, step);
  s.end = max(s.end, step + 1);
  return s;
}

__device__ inline int64_t offset(const SequenceTensor& x, int64_t batch, int64_t channel, int64_t step) {
  return batch * x.batch_stride + (x.channels_last ? step * x.stride + channel : channel * x.stride + step);
}
template <typename T>
__device__ __forceinline__ T* address(const SequenceTensor& x, int64_t batch, int64_t channel, int64_t step) {
  return static_cast<T*>(x.data) + offset(x, batch, channel, step);
}

// A step before the sequence: of its initial states, or zero.
__device__ inline float before(const CausalConv1dParams& p, const Sequence& s, int64_t channel, int64_t step) {
  const int64_t state = p.width - 1 + step - s.begin;
  if (!p.initial_states || state < 0) return 0;
  return p.initial_states[(s.index * p.dim + channel) * (p.width - 1) + state];
}
template <typename T>
__device__ inline float input(const CausalConv1dParams& p, const Sequence& s, int64_t channel, int64_t step) {
  return step < s.begin ? before(p, s, channel, step) : to_float(*address<T>(p.x, s.batch, channel, step));
}

// A step of neighbouring channels.
template <typename T, int kVector>
__device__ __forceinline__ void inputs(const CausalConv1dParams& p, const Sequence& s, int64_t channel, int64_t step,
                                       float (&x)[kVector]) {
  if (step < s.begin) {
#pragma unroll
    for (int v = 0; v < kVector; ++v) x[v] = before(p, s, channel + v, step);
  } else {
    const auto loaded = load_vector<kVector>(address<const T>(p.x, s.batch, channel, step));
#pragma unroll
    for (int v = 0; v < kVector; ++v) x[v] = loaded[v];
  }
}

// The filter of a channel, padded with zeros for earlier steps: these are left out, for a step may be infinite.
struct Filter {
  float weight[kFilter], bias;
  int padding;

  Filter() = default;
  __device__ Filter(const CausalConv1dParams& p, int64_t channel)
      : bias(p.bias ? p.bias[channel] : 0.0f), padding(kFilter - static_cast<int>(p.width)) {
#pragma unroll
    for (int k = 0; k < kFilter; ++k) weight[k] = k < padding ? 0.0f : p.weight[channel * p.width + k - padding];
  }

  template <typename Steps>
  __device__ __forceinline__ float convolve(const Steps& x) const {
    float y = bias;
#pragma unroll
    for (int k = 0; k < kFilter; ++k) {
      if (k >= padding) y += weight[k] * x(k);
    }
    return y;
  }

  // The gradient of a step, from those of the convolution at this step and the next ones.
  template <typename Gradients>
  __device__ __forceinline__ float transpose(const Gradients& gradient) const {
    float sum = 0;
#pragma unroll
    for (int k = 0; k < kFilter; ++k) {
      if (kFilter - 1 - k >= padding) sum += weight[kFilter - 1 - k] * gradient(k);
    }
    return sum;
  }
};

__device__ __forceinline__ float silu(float y) { return y * sigmoid(y); }
__device__ __forceinline__ float silu_slope(float y) {
  const float s = sigmoid(y);
  return s * (1.0f + y * (1.0f - s));
}

// The tile of a block, and where a thread is in it. The number of blocks fits into 32 bits, and so do those of all tiles, which
// divide several times as fast.
struct ConvTile {
  __device__ explicit ConvTile(const ConvTiles& tiles)
      : lane(static_cast<int>(threadIdx.x) % kWarp),
        warp(static_cast<int>(threadIdx.x) / kWarp),
        share(blockIdx.x / static_cast<unsigned>(tiles.channel_tiles)),
        channel(blockIdx.x % static_cast<unsigned>(tiles.channel_tiles) * tiles.channels),
        step(share % static_cast<unsigned>(tiles.step_tiles) * tiles.steps),
        batch(share / static_cast<unsigned>(tiles.step_tiles)) {}
  int lane, warp;
  unsigned share;
  int64_t channel, step, batch;
};

// Of a kernel with a thread for each row and channel.
struct RowAndChannel {
  __device__ explicit RowAndChannel(int64_t dim) {
    const auto row_blocks = static_cast<unsigned>((dim + kConvThreads - 1) / kConvThreads);
    row = blockIdx.x / row_blocks;
    channel = int64_t{blockIdx.x % row_blocks} * kConvThreads + threadIdx.x;
  }
  int64_t row, channel;
};

// What the lane so many steps back has, where the warp takes kWarp neighbouring steps at a time; `earlier` holds the last steps of
// the warp's last turn in its last lanes.
__device__ __forceinline__ float lane_back(float x, float earlier, int lane, int back) {
  return __shfl_sync(kAllLanes, lane >= kWarp - back ? earlier : x, (lane - back) & (kWarp - 1));
}

// The steps t - kFilter + 1 ... t of one channel, given step t and what earlier lanes have.
__device__ __forceinline__ void lanes_back(const CausalConv1dParams& p, const Sequence& s, int64_t channel, int64_t t, float now,
                                           float earlier, int lane, float (&x)[kFilter]) {
  x[kFilter - 1] = now;
#pragma unroll
  for (int back = 1; back < kFilter; ++back) x[kFilter - 1 - back] = lane_back(now, earlier, lane, back);
  if (t - (kFilter - 1) >= s.begin) return;
#pragma unroll
  for (int back = 1; back < kFilter; ++back) {
    if (t - back < s.begin) x[kFilter - 1 - back] = before(p, s, channel, t - back);
  }
}

}  // namespace ssmtune::cuda
