#include "cpu/causal_conv1d.h"
#include "cpu/dispatch.h"

namespace ssmtune::SSMTUNE_CPU_CAPABILITY {
namespace {

struct Workspace {
  Workspace(const CausalConv1dParams& p, Arena& arena) {
    const int64_t channels = p.partition.max_range_channels();
    weight = arena.take(channels * p.width);
    bias = arena.take(channels);
    x = arena.take((p.width - 1 + kChunk) * kLanes);
    out = arena.take(kChunk * kLanes);
  }
  float *weight, *bias, *x, *out;
};

template <int kWidth>
void forward_tile(const CausalConv1dForward& p, const Rows<const float>& x, const float* weight, Vec bias, const Rows<float>& out,
                  int64_t steps) {
  for (int64_t t = 0; t < steps; ++t) {
    Vec y = convolve<kWidth>(x, t, weight, bias, p.width);
    if (p.silu) y = silu(y);
    store(out[t], y);
  }
}

// Some blocks of channels at the steps [from, to), in whatever memory.
void forward_tiles(const CausalConv1dForward& p, const Workspace& w, const Channels& channels, int64_t first_block,
                   int64_t blocks, const Piece& piece, int64_t from, int64_t to) {
  for (int64_t time = from; time < to; time += kChunk) {
    const int64_t steps = to - time < kChunk ? to - time : kChunk;
    for (int64_t i = first_block; i < blocks; ++i) {
      const TilePosition at{piece.batch, channels.channel(i), channels.lanes(i), time, steps};
      const Rows<const float> x = rows_with_context(p, piece, at, w.x);
      const Rows<float> out = output_rows(p.out, at, w.out);
      const float* const weight = w.weight + i * p.width * kLanes;
      const Vec bias = load(w.bias + i * kLanes);
      switch (p.width) {
        case 2: forward_tile<2>(p, x, weight, bias, out, steps); break;
        case 3: forward_tile<3>(p, x, weight, bias, out, steps); break;
        case 4: forward_tile<4>(p, x, weight, bias, out, steps); break;
        default: forward_tile<0>(p, x, weight, bias, out, steps);
      }
      finish_rows(p.out, at, out);
    }
  }
}

// kSteps steps from `time` on: they share rows, so each of these is converted once for all of them.
template <typename T, int kWidth, bool kSilu, int kSteps>
void forward_steps(const CausalConv1dForward& p, const Workspace& w, const TilePosition& at, int64_t blocks) {
  const int64_t x_stride = p.x.stride, out_stride = p.out.stride;
  const T* x = address<const T>(p.x, at) - (kWidth - 1) * x_stride;
  T* out = address<T>(p.out, at);
  const float *weight = w.weight, *bias = w.bias;
  for (int64_t i = 0; i < blocks; ++i) {
    Vec rows[kWidth - 1 + kSteps];
    SSMTUNE_UNROLL
    for (int t = 0; t < kWidth - 1 + kSteps; ++t) rows[t] = load(x + t * x_stride);
    SSMTUNE_UNROLL
    for (int t = 0; t < kSteps; ++t) {
      Vec y = load(bias);
      SSMTUNE_UNROLL
      for (int k = 0; k < kWidth; ++k) y += load(weight + k * kLanes) * rows[t + k];
      if constexpr (kSilu) y = silu(y);
      store(out + t * out_stride, y);
    }
    x += kLanes, out += kLanes, weight += kWidth * kLanes, bias += kLanes;
  }
}

template <typename T, int kWidth, bool kSilu>
void forward_rows(const CausalConv1dForward& p, const Workspace& w, TilePosition at, int64_t blocks, int64_t end) {
  constexpr int kSteps = 8;
  for (; end - at.time >= kSteps; at.time += kSteps) forward_steps<T, kWidth, kSilu, kSteps>(p, w, at, blocks);
  for (; at.time < end; ++at.time) forward_steps<T, kWidth, kSilu, 1>(p, w, at, blocks);
}

template <typename T, bool kSilu>
void forward_rows(const CausalConv1dForward& p, const Workspace& w, const TilePosition& at, int64_t blocks, int64_t end) {
  switch (p.width) {
    case 2: return forward_rows<T, 2, kSilu>(p, w, at, blocks, end);
    case 3: return forward_rows<T, 3, kSilu>(p, w, at, blocks, end);
    case 4: return forward_rows<T, 4, kSilu>(p, w, at, blocks, end);
  }
}

template <typename T>
void forward_rows(const CausalConv1dForward& p, const Workspace& w, const TilePosition& at, int64_t blocks, int64_t end) {
  return p.silu ? forward_rows<T, true>(p, w, at, blocks, end) : forward_rows<T, false>(p, w, at, blocks, end);
}

void run(const CausalConv1dForward& p, int64_t task, float* scratch) {
  Arena arena(scratch);
  const Workspace w(p, arena);
  const Channels channels(p, task);
  channels.pack(p, w.weight, w.bias);
  const int64_t in_rows = blocks_in_rows(p, {&p.x, &p.out}, channels);
  for_each_piece(p, task, [&](const Piece& piece) {
    if (in_rows > 0) {
      const int64_t first = first_step_in_rows(p, piece);
      forward_tiles(p, w, channels, 0, in_rows, piece, piece.from, first);
      const TilePosition at{piece.batch, channels.begin, kLanes, first, 0};
      switch (p.x.dtype) {
        case DType::kFloat32: forward_rows<float>(p, w, at, in_rows, piece.to); break;
        case DType::kBFloat16: forward_rows<BFloat16>(p, w, at, in_rows, piece.to); break;
        case DType::kFloat16: forward_rows<Float16>(p, w, at, in_rows, piece.to); break;
      }
    }
    forward_tiles(p, w, channels, in_rows, channels.count(), piece, piece.from, piece.to);
    if (!p.final_states.data || piece.to < piece.end) return;
    for (int64_t i = 0; i < channels.count(); ++i) {
      const TilePosition end{piece.batch, channels.channel(i), channels.lanes(i), piece.end, 0};
      const Rows<const float> states = rows_with_context(p, piece, end, w.x);
      write_tile(p.final_states, {piece.index, end.channel, end.lanes, 0, p.width - 1}, states.data, states.stride);
    }
  });
}

int64_t scratch_floats(const CausalConv1dForward& p) {
  Arena arena(nullptr);
  Workspace(p, arena);
  return arena.used();
}

}  // namespace

extern const Kernel<CausalConv1dForward> causal_conv1d_fwd;
const Kernel<CausalConv1dForward> causal_conv1d_fwd{scratch_floats, run};

}  // namespace ssmtune::SSMTUNE_CPU_CAPABILITY
