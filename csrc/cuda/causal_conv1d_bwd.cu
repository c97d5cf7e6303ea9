#include "cuda/causal_conv1d_device.h"

namespace ssmtune::cuda {
namespace {

constexpr int kSums = kFilter + 1;  // of a channel: its dweight and its dbias
constexpr int kAhead = 2;           // loads of each input that a thread has under way at a time

// The gradient of the convolution at one step, before it is activated.
template <typename T>
__device__ inline float gradient_at(const CausalConv1dBackward& p, const Sequence& s, const Filter& filter, int64_t channel,
                                    int64_t step) {
  const float dout = to_float(*address<const T>(p.dout, s.batch, channel, step));
  if (!p.silu) return dout;
  return dout * silu_slope(filter.convolve([&](int k) { return input<T>(p, s, channel, step - kFilter + 1 + k); }));
}

// As in the forward pass. The gradient of step t takes those of the kFilter - 1 steps after it, so a thread runs as far ahead of
// what it writes; of dweight and dbias each step is counted by the thread that writes it.
template <typename T, int kVector, bool kSilu>
__global__ void __launch_bounds__(kConvThreads, 2)
    causal_conv1d_channels_bwd_kernel(const CausalConv1dBackward p, const ConvTiles tiles) {
  const ConvTile tile(tiles);
  const int64_t channel = tile.channel + tile.lane * kVector, begin = tile.step + tile.warp * kBackwardSteps;
  const int64_t end = min(begin + kBackwardSteps, p.seqlen);
  float sums[kSums][kVector] = {};

  if (channel < p.dim && begin < end) {
    Filter filters[kVector];
#pragma unroll
    for (int v = 0; v < kVector; ++v) filters[v] = Filter(p, channel + v);

    for (int64_t t = begin; t < end;) {
      const Sequence s = sequence_at(p, tile.batch, t);
      const int64_t stop = min(end, s.end);
      // steps from here on: those the thread writes, and those it reads
      const int written = static_cast<int>(stop - t), read = static_cast<int>(min(s.end, stop + kFilter - 1) - t);
      float x[kFilter][kVector], gradients[kFilter][kVector] = {};
#pragma unroll
      for (int k = 1; k < kFilter; ++k) inputs<T>(p, s, channel, t - kFilter + k, x[k]);
      const T* from = address<const T>(p.x, tile.batch, channel, t);
      const T* dfrom = address<const T>(p.dout, tile.batch, channel, t);
      T* to = address<T>(p.dx, tile.batch, channel, t - (kFilter - 1));
      for (int begin = 0; begin < written + kFilter - 1; begin += kAhead) {
        Vector<T, kVector> ahead[kAhead], dahead[kAhead];
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          // past the last step zeros, whose gradients are zero
          ahead[i] = dahead[i] = {};
          if (begin + i >= read) continue;
          ahead[i] = load_vector<kVector>(from + i * p.x.stride);
          dahead[i] = load_vector<kVector>(dfrom + i * p.dout.stride);
        }
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
          const int step = begin + i - (kFilter - 1);
          Vector<T, kVector> dx;
#pragma unroll
          for (int v = 0; v < kVector; ++v) {
#pragma unroll
            for (int k = 1; k < kFilter; ++k) x[k - 1][v] = x[k][v], gradients[k - 1][v] = gradients[k][v];
            x[kFilter - 1][v] = ahead[i][v];
            const float y = filters[v].convolve([&](int k) { return x[k][v]; });
            const float gradient = dahead[i][v] * (kSilu ? silu_slope(y) : 1.0f);
            gradients[kFilter - 1][v] = gradient;
            dx.set(v, filters[v].transpose([&](int k) { return gradients[k][v]; }));
            const float counted = begin + i < written ? gradient : 0.0f;
#pragma unroll
            for (int k = 0; k < kFilter; ++k) sums[k][v] += counted * x[k][v];
            sums[kFilter][v] += counted;
          }
          if (p.dx.data && step >= 0 && step < written) store_vector(to + i * p.dx.stride, dx);
        }
        from += kAhead * p.x.stride;
        dfrom += kAhead * p.dout.stride;
        to += kAhead * p.dx.stride;
      }
      t = stop;
    }
  }

  if (!p.shares) return;
  constexpr int kChannels = kWarp * kVector;
  auto& shared = shared_memory<float[kSums][kConvWarps][kVector][kWarp]>();
#pragma unroll
  for (int k = 0; k < kSums; ++k) {
#pragma unroll
    for (int v = 0; v < kVector; ++v) shared[k][tile.warp][v][tile.lane] = sums[k][v];
  }
  __syncthreads();
  for (int i = static_cast<int>(threadIdx.x); i < kSums * kChannels; i += kConvThreads) {
    const int k = i / kChannels, c = i % kChannels;
    if (tile.channel + c >= p.dim) continue;
    float sum = 0;
#pragma unroll
    for (int warp = 0; warp < kConvWarps; ++warp) sum += shared[k][warp][c % kVector][c / kVector];
    p.shares[(tile.share * kSums + k) * p.dim + tile.channel + c] = sum;
  }
}

// Each lane computes the gradient of its step and gets those of the next ones from its neighbours; the last lanes, which have too
// few, compute for the others only.
template <typename T>
__global__ void __launch_bounds__(kConvThreads)
    causal_conv1d_steps_bwd_kernel(const CausalConv1dBackward p, const ConvTiles tiles) {
  const ConvTile tile(tiles);
  const int64_t channel = tile.channel + tile.warp, end = min(tile.step + tiles.steps, p.seqlen);
  if (channel >= p.dim) return;
  const Filter filter(p, channel);
  float sums[kSums] = {};
  Sequence s = sequence_at(p, tile.batch, tile.step);
  const int64_t before_tile = tile.step - kWarp + tile.lane;
  float earlier = before_tile >= s.begin && tile.lane > kWarp - kFilter ? input<T>(p, s, channel, before_tile) : 0.0f;
  for (int64_t begin = tile.step; begin < end; begin += kBackwardRound) {
    const int64_t t = begin + tile.lane, last = min(t, p.seqlen - 1);
    const bool owned = tile.lane < kBackwardRound && t < end;
    // a lane goes back a few steps from one turn to the next
    if (last >= s.end || last < s.begin) s = sequence_at(p, tile.batch, last);
    const float now = to_float(*address<const T>(p.x, tile.batch, channel, last));
    const float dout = to_float(*address<const T>(p.dout, tile.batch, channel, last));
    float x[kFilter];
    lanes_back(p, s, channel, t, now, earlier, tile.lane, x);
    // the next turn begins before the end of this one
    earlier = __shfl_up_sync(kAllLanes, now, kWarp - kBackwardRound);
    const float y = filter.convolve([&](int k) { return x[k]; });
    const float gradient = t < p.seqlen ? (p.silu ? dout * silu_slope(y) : dout) : 0.0f;
    float later[kFilter];
#pragma unroll
    for (int k = 0; k < kFilter; ++k) {
      later[k] = __shfl_down_sync(kAllLanes, gradient, k);
      if (t + k >= s.end) later[k] = 0;
    }
    const float dx = filter.transpose([&](int k) { return later[k]; });
    const float counted = owned ? gradient : 0.0f;
#pragma unroll
    for (int k = 0; k < kFilter; ++k) sums[k] += counted * x[k];
    sums[kFilter] += counted;
    if (p.dx.data && owned) *address<T>(p.dx, tile.batch, channel, t) = from_float<T>(dx);
  }
  if (!p.shares) return;
#pragma unroll
  for (int k = 0; k < kSums; ++k) {
#pragma unroll
    for (int apart = kWarp / 2; apart > 0; apart /= 2) sums[k] += __shfl_down_sync(kAllLanes, sums[k], apart);
    if (tile.lane == 0) p.shares[(tile.share * kSums + k) * p.dim + channel] = sums[k];
  }
}

// Adds up the shares of kWarp channels for one of the sums, in an order that depends on their number alone.
__global__ void __launch_bounds__(kConvThreads) causal_conv1d_shares_bwd_kernel(const CausalConv1dBackward p, int64_t shares) {
  const int lane = static_cast<int>(threadIdx.x) % kWarp, first = static_cast<int>(threadIdx.x) / kWarp;
  const int64_t channel = int64_t{blockIdx.x / kSums} * kWarp + lane;
  const int k = static_cast<int>(blockIdx.x % kSums), padding = kFilter - static_cast<int>(p.width);
  float sum = 0;
  if (channel < p.dim) {
    for (int64_t i = first; i < shares; i += kConvWarps) sum += p.shares[(i * kSums + k) * p.dim + channel];
  }
  auto& shared = shared_memory<float[kConvWarps][kWarp]>();
  shared[first][lane] = sum;
  __syncthreads();
  if (first > 0 || channel >= p.dim) return;
  for (int warp = 1; warp < kConvWarps; ++warp) sum += shared[warp][lane];
  if (k == kFilter) {
    if (p.dbias) p.dbias[channel] = sum;
  } else if (p.dweight && k >= padding) {
    p.dweight[channel * p.width + k - padding] = sum;
  }
}

// The gradient of the initial states, and that of the steps which are final states too.
template <typename T>
__global__ void __launch_bounds__(kConvThreads) causal_conv1d_states_bwd_kernel(const CausalConv1dBackward p) {
  const auto [row, channel] = RowAndChannel(p.dim);
  if (channel >= p.dim) return;
  const Sequence s = sequence(p, row);
  const int64_t context = p.width - 1, steps = s.end - s.begin;
  const Filter filter(p, channel);
  float gradients[kFilter - 1];

  const auto final_gradient = [&](int64_t step) {
    const int64_t state = step - s.end + context;
    return p.dfinal_states.data && state >= 0 ? to_float(*address<const T>(p.dfinal_states, s.index, channel, state)) : 0.0f;
  };

  if (p.dinitial_states) {
#pragma unroll
    for (int k = 0; k < kFilter - 1; ++k) gradients[k] = k < steps ? gradient_at<T>(p, s, filter, channel, s.begin + k) : 0.0f;
#pragma unroll
    for (int state = 0; state < kFilter - 1; ++state) {
      if (state >= context) break;
      float sum = final_gradient(s.begin - context + state);
#pragma unroll
      for (int k = 0; k <= state; ++k) sum += p.weight[channel * p.width + k] * gradients[state - k];
      p.dinitial_states[(s.index * p.dim + channel) * context + state] = sum;
    }
  }

  if (p.dfinal_states.data && p.dx.data) {
    // of the last step first, which takes that of no other
#pragma unroll
    for (int back = 0; back < kFilter - 1; ++back) {
      if (back >= steps || back >= context) break;
      gradients[back] = gradient_at<T>(p, s, filter, channel, s.end - 1 - back);
      const float sum = final_gradient(s.end - 1 - back) +
                        filter.transpose([&](int k) { return k <= back ? gradients[back - k] : 0.0f; });
      *address<T>(p.dx, s.batch, channel, s.end - 1 - back) = from_float<T>(sum);
    }
  }
}

template <typename T, int kVector>
int launch_channels(const CausalConv1dBackward& p, const ConvTiles& tiles, void* stream) {
  const auto kernel = p.silu ? causal_conv1d_channels_bwd_kernel<T, kVector, true> : causal_conv1d_channels_bwd_kernel<T, kVector, false>;
  return launch(kernel, tiles.blocks(), kConvThreads, kSums * kConvThreads * kVector * sizeof(float), stream, p, tiles);
}

template <typename T>
int launch_all(const CausalConv1dBackward& p, void* stream) {
  const ConvTiles tiles = backward_tiles(p);
  int error = 0;
  if (p.dx.data || p.shares) {
    if (tiles.vector == kConvVector) {
      error = launch_channels<T, kConvVector>(p, tiles, stream);
    } else if (tiles.vector) {
      error = launch_channels<T, 1>(p, tiles, stream);
    } else {
      error = launch(causal_conv1d_steps_bwd_kernel<T>, tiles.blocks(), kConvThreads, 0, stream, p, tiles);
    }
  }
  if (!error && p.shares) {
    const int64_t blocks = kSums * ceil_div(p.dim, kWarp);
    error = launch(causal_conv1d_shares_bwd_kernel, blocks, kConvThreads, kConvThreads * sizeof(float), stream, p, tiles.shares());
  }
  // after the kernel that writes dx, some steps of which it writes again
  if (!error && (p.dinitial_states || p.dfinal_states.data)) {
    error = launch(causal_conv1d_states_bwd_kernel<T>, p.sequences * row_blocks(p.dim), kConvThreads, 0, stream, p);
  }
  return error;
}

}  // namespace

int causal_conv1d_bwd(const CausalConv1dBackward& p, void* stream) {
  return dispatch(p.x.dtype, [&](auto element) { return launch_all<decltype(element)>(p, stream); });
}

}  // namespace ssmtune::cuda
