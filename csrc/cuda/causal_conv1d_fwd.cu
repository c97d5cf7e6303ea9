#include "cuda/causal_conv1d_device.h"

namespace ssmtune::cuda {
namespace {

// Loads that a thread has under way at a time.
constexpr int kAhead = 4;

// Channels that lie next to each other: a warp takes kWarp * kVector of them, and each thread goes through some steps.
template <typename T, int kVector, bool kSilu>
__global__ void __launch_bounds__(kConvThreads)
    causal_conv1d_channels_fwd_kernel(const CausalConv1dForward p, const ConvTiles tiles) {
  const ConvTile tile(tiles);
  const int64_t channel = tile.channel + tile.lane * kVector, begin = tile.step + tile.warp * kForwardSteps;
  const int64_t end = min(begin + kForwardSteps, p.seqlen);
  if (channel >= p.dim || begin >= end) return;

  Filter filters[kVector];
#pragma unroll
  for (int v = 0; v < kVector; ++v) filters[v] = Filter(p, channel + v);

  for (int64_t t = begin; t < end;) {
    const Sequence s = sequence_at(p, tile.batch, t);
    const int steps = static_cast<int>(min(end, s.end) - t);
    float x[kFilter][kVector];
#pragma unroll
    for (int k = 1; k < kFilter; ++k) inputs<T>(p, s, channel, t - kFilter + k, x[k]);
    const T* from = address<const T>(p.x, tile.batch, channel, t);
    T* to = address<T>(p.out, tile.batch, channel, t);
    for (int begin = 0; begin < steps; begin += kAhead) {
      Vector<T, kVector> ahead[kAhead];
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        if (begin + i < steps) ahead[i] = load_vector<kVector>(from + i * p.x.stride);
      }
#pragma unroll
      for (int i = 0; i < kAhead; ++i) {
        Vector<T, kVector> out;
#pragma unroll
        for (int v = 0; v < kVector; ++v) {
#pragma unroll
          for (int k = 1; k < kFilter; ++k) x[k - 1][v] = x[k][v];
          x[kFilter - 1][v] = ahead[i][v];
          const float y = filters[v].convolve([&](int k) { return x[k][v]; });
          out.set(v, kSilu ? silu(y) : y);
        }
        if (begin + i < steps) store_vector(to + i * p.out.stride, out);
      }
      from += kAhead * p.x.stride;
      to += kAhead * p.out.stride;
    }
    t += steps;
  }
}

// Any other memory: a warp takes kWarp steps of one channel at a time.
template <typename T>
__global__ void __launch_bounds__(kConvThreads)
    causal_conv1d_steps_fwd_kernel(const CausalConv1dForward p, const ConvTiles tiles) {
  const ConvTile tile(tiles);
  const int64_t channel = tile.channel + tile.warp, end = min(tile.step + tiles.steps, p.seqlen);
  if (channel >= p.dim) return;
  const Filter filter(p, channel);
  Sequence s = sequence_at(p, tile.batch, tile.step);
  // the last lanes begin with what is before the tile
  const int64_t before_tile = tile.step - kWarp + tile.lane;
  float earlier = before_tile >= s.begin && tile.lane > kWarp - kFilter ? input<T>(p, s, channel, before_tile) : 0.0f;
  for (int64_t begin = tile.step; begin < end; begin += kWarp) {
    const int64_t t = begin + tile.lane, last = min(t, p.seqlen - 1);
    if (last >= s.end) s = sequence_at(p, tile.batch, last);
    const float now = to_float(*address<const T>(p.x, tile.batch, channel, last));
    float x[kFilter];
    lanes_back(p, s, channel, t, now, earlier, tile.lane, x);
    earlier = now;
    const float y = filter.convolve([&](int k) { return x[k]; });
    if (t < end) *address<T>(p.out, tile.batch, channel, t) = from_float<T>(p.silu ? silu(y) : y);
  }
}

template <typename T>
__global__ void __launch_bounds__(kConvThreads) causal_conv1d_states_fwd_kernel(const CausalConv1dForward p) {
  const auto [row, channel] = RowAndChannel(p.dim);
  if (channel >= p.dim) return;
  const Sequence s = sequence(p, row);
  const int64_t context = p.width - 1;
  for (int64_t k = 0; k < context; ++k) {
    *address<T>(p.final_states, s.index, channel, k) = from_float<T>(input<T>(p, s, channel, s.end - context + k));
  }
}

template <typename T, int kVector>
int launch_channels(const CausalConv1dForward& p, const ConvTiles& tiles, void* stream) {
  const auto kernel = p.silu ? causal_conv1d_channels_fwd_kernel<T, kVector, true> : causal_conv1d_channels_fwd_kernel<T, kVector, false>;
  return launch(kernel, tiles.blocks(), kConvThreads, 0, stream, p, tiles);
}

template <typename T>
int launch_all(const CausalConv1dForward& p, void* stream) {
  const ConvTiles tiles = forward_tiles(p);
  int error;
  if (tiles.vector == kConvVector) {
    error = launch_channels<T, kConvVector>(p, tiles, stream);
  } else if (tiles.vector) {
    error = launch_channels<T, 1>(p, tiles, stream);
  } else {
    error = launch(causal_conv1d_steps_fwd_kernel<T>, tiles.blocks(), kConvThreads, 0, stream, p, tiles);
  }
  if (error || !p.final_states.data) return error;
  return launch(causal_conv1d_states_fwd_kernel<T>, p.sequences * row_blocks(p.dim), kConvThreads, 0, stream, p);
}

}  // namespace

int causal_conv1d_fwd(const CausalConv1dForward& p, void* stream) {
  return dispatch(p.x.dtype, [&](auto element) { return launch_all<decltype(element)>(p, stream); });
}

}  // namespace ssmtune::cuda
