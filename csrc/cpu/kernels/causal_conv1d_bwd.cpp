#include "cpu/causal_conv1d.h"
#include "cpu/dispatch.h"

namespace ssmtune::SSMTUNE_CPU_CAPABILITY {
namespace {

struct Workspace {
  Workspace(const CausalConv1dBackward& p, Arena& arena) {
    const int64_t channels = p.partition.max_range_channels(), context = p.width - 1;
    weight = arena.take(channels * p.width);
    bias = arena.take(channels);
    dweight = arena.take(channels * p.width);
    dbias = arena.take(channels);
    carry = arena.take(channels * context);
    x = arena.take((context + kChunk) * kLanes);
    dx = arena.take(kChunk * kLanes);
    dout = arena.take(kChunk * kLanes);
    gradient = arena.take((kChunk + context) * kLanes);
    states = arena.take(context * kLanes);
    dfinal_states = arena.take(context * kLanes);
    unused = arena.take((p.width + 1) * kLanes);
  }
  float *weight, *bias, *dweight, *dbias;
  float* carry;  // the gradients of the first width - 1 steps after those worked on
  float *x, *dx, *dout;
  float* gradient;  // of the convolution before SiLU, followed by the carried rows
  float *states, *dfinal_states;
  float* unused;  // takes sums that are another piece's to add up
};

// Of the convolution before SiLU.
SSMTUNE_INLINE Vec silu_gradient(Vec y, Vec dout) {
  const Vec s = sigmoid(y);
  return dout * (s * (1.0f + y * (1.0f - s)));
}

// The gradient before SiLU, and what it adds to those of weight and bias.
template <int kWidth>
void gradient_tile(const CausalConv1dBackward& p, const Rows<const float>& x, const float* weight, Vec bias,
                   const Rows<const float>& dout, float* gradient, float* dweight, float* dbias, int64_t steps) {
  const int64_t width = kWidth > 0 ? kWidth : p.width;
  Vec sums[kWidth > 0 ? kWidth : 1] = {};
  Vec sum = load(dbias);
  for (int64_t t = 0; t < steps; ++t) {
    Vec g = load(dout[t]);
    if (p.silu) g = silu_gradient(convolve<kWidth>(x, t, weight, bias, p.width), g);
    store(gradient + t * kLanes, g);
    sum += g;
    if constexpr (kWidth > 0) {
      SSMTUNE_UNROLL
      for (int k = 0; k < kWidth; ++k) sums[k] += g * load(x[t + k]);
    } else {
      for (int64_t k = 0; k < width; ++k) store(dweight + k * kLanes, load(dweight + k * kLanes) + g * load(x[t + k]));
    }
  }
  store(dbias, sum);
  if constexpr (kWidth > 0) {
    SSMTUNE_UNROLL
    for (int k = 0; k < kWidth; ++k) store(dweight + k * kLanes, load(dweight + k * kLanes) + sums[k]);
  }
}

// dx_t = sum_k weight_k gradient_{t + width - 1 - k}
template <int kWidth>
void input_gradient_tile(const float* gradient, const float* weight, int64_t width, const Rows<float>& dx, int64_t steps) {
  if constexpr (kWidth > 0) width = kWidth;
  for (int64_t t = 0; t < steps; ++t) {
    Vec sum{};
    SSMTUNE_UNROLL
    for (int64_t k = 0; k < width; ++k) sum += load(weight + k * kLanes) * load(gradient + (t + width - 1 - k) * kLanes);
    store(dx[t], sum);
  }
}

// The final states are inputs: step t of the sequence is the state t - steps + width - 1, and adds its gradient to that
// of the input. Adds those of `count` steps from `first` on, which may be negative for steps before the sequence.
void add_final_gradient(const CausalConv1dBackward& p, const Workspace& w, const Piece& piece, const TilePosition& channels,
                        int64_t first, int64_t count, const Rows<float>& rows) {
  if (!p.dfinal_states.data) return;
  const int64_t shift = p.width - 1 - (piece.end - piece.begin);
  const int64_t begin = first + shift < 0 ? -shift : first;
  const int64_t steps = first + count - begin;
  if (steps <= 0) return;
  read_tile(p.dfinal_states, {piece.index, channels.channel, channels.lanes, begin + shift, steps}, w.dfinal_states, kLanes);
  for (int64_t t = 0; t < steps; ++t) {
    float* const row = rows[begin - first + t];
    store(row, load(row) + load(w.dfinal_states + t * kLanes));
  }
}

template <int kWidth>
void backward_tile(const CausalConv1dBackward& p, const Workspace& w, const Piece& piece, int64_t block, const TilePosition& at) {
  const int64_t context = p.width - 1;
  const float* const weight = w.weight + block * p.width * kLanes;
  const Vec bias = load(w.bias + block * kLanes);
  float* const carry = w.carry + block * context * kLanes;
  const Rows<const float> x = rows_with_context(p, piece, at, w.x), dout = input_rows(p.dout, at, w.dout);
  if (at.time >= piece.to) {
    // steps of the next piece that look back to this one
    float* const rows = carry + (at.time - piece.to) * kLanes;
    gradient_tile<kWidth>(p, x, weight, bias, dout, rows, w.unused, w.unused + p.width * kLanes, at.steps);
    return;
  }
  gradient_tile<kWidth>(p, x, weight, bias, dout, w.gradient, w.dweight + block * p.width * kLanes, w.dbias + block * kLanes,
                        at.steps);
  copy(w.gradient + at.steps * kLanes, carry, context * kLanes);
  if (p.dx.data) {
    const Rows<float> dx = output_rows(p.dx, at, w.dx);
    input_gradient_tile<kWidth>(w.gradient, weight, p.width, dx, at.steps);
    add_final_gradient(p, w, piece, at, at.time - piece.begin, at.steps, dx);
    finish_rows(p.dx, at, dx);
  }
  copy(carry, w.gradient, context * kLanes);
}

// Some blocks of channels at the steps [from, to), the last first, in whatever memory.
void backward_tiles(const CausalConv1dBackward& p, const Workspace& w, const Channels& channels, int64_t first_block,
                    int64_t blocks, const Piece& piece, int64_t from, int64_t to) {
  for (int64_t end = to; end > from; end -= kChunk) {
    const int64_t steps = end - from < kChunk ? end - from : kChunk;
    for (int64_t i = first_block; i < blocks; ++i) {
      const TilePosition at{piece.batch, channels.channel(i), channels.lanes(i), end - steps, steps};
      switch (p.width) {
        case 2: backward_tile<2>(p, w, piece, i, at); break;
        case 3: backward_tile<3>(p, w, piece, i, at); break;
        case 4: backward_tile<4>(p, w, piece, i, at); break;
        default: backward_tile<0>(p, w, piece, i, at);
      }
    }
  }
}

constexpr int kSteps = 8;

// kSteps steps from at.time on, after those that left their gradients in w.carry: they share rows, so each of these is
// converted once for all of them.
template <typename T, int kWidth, bool kSilu>
void backward_steps(const CausalConv1dBackward& p, const Workspace& w, const TilePosition& at, int64_t blocks) {
  constexpr int kContext = kWidth - 1;
  constexpr int64_t kAhead = 512 / sizeof(T);  // more rows are read at once than the hardware keeps apart
  const int64_t x_stride = p.x.stride, dout_stride = p.dout.stride, dx_stride = p.dx.stride;
  const T* x = address<const T>(p.x, at) - kContext * x_stride;
  const T* dout = address<const T>(p.dout, at);
  T* dx = p.dx.data ? address<T>(p.dx, at) : nullptr;
  const float *weight = w.weight, *bias = w.bias;
  float *dweight = w.dweight, *dbias = w.dbias, *carry = w.carry;
  for (int64_t i = 0; i < blocks; ++i) {
    Vec rows[kContext + kSteps], gradient[kSteps + kContext];
    SSMTUNE_UNROLL
    for (int t = 0; t < kContext + kSteps; ++t) rows[t] = load(x + t * x_stride);
    SSMTUNE_UNROLL
    for (int t = 0; t < kContext; ++t) gradient[kSteps + t] = load(carry + t * kLanes);
    Vec sum = load(dbias);
    SSMTUNE_UNROLL
    for (int t = 0; t < kSteps; ++t) {
      __builtin_prefetch(x + t * x_stride + kAhead);
      __builtin_prefetch(dout + t * dout_stride + kAhead);
      gradient[t] = load(dout + t * dout_stride);
      if constexpr (kSilu) {
        Vec y = load(bias);
        SSMTUNE_UNROLL
        for (int k = 0; k < kWidth; ++k) y += load(weight + k * kLanes) * rows[t + k];
        gradient[t] = silu_gradient(y, gradient[t]);
      }
      sum += gradient[t];
    }
    store(dbias, sum);
    SSMTUNE_UNROLL
    for (int k = 0; k < kWidth; ++k) {
      Vec products = load(dweight + k * kLanes);
      SSMTUNE_UNROLL
      for (int t = 0; t < kSteps; ++t) products += gradient[t] * rows[t + k];
      store(dweight + k * kLanes, products);
    }
    SSMTUNE_UNROLL
    for (int t = 0; t < kContext; ++t) store(carry + t * kLanes, gradient[t]);
    if (dx) {
      SSMTUNE_UNROLL
      for (int t = 0; t < kSteps; ++t) {
        Vec dx_t{};
        SSMTUNE_UNROLL
        for (int k = 0; k < kWidth; ++k) dx_t += load(weight + k * kLanes) * gradient[t + kContext - k];
        store(dx + t * dx_stride, dx_t);
      }
      dx += kLanes;
    }
    x += kLanes, dout += kLanes, weight += kWidth * kLanes, bias += kLanes;
    dweight += kWidth * kLanes, dbias += kLanes, carry += kContext * kLanes;
  }
}

template <typename T, bool kSilu>
void backward_steps(const CausalConv1dBackward& p, const Workspace& w, const TilePosition& at, int64_t blocks) {
  switch (p.width) {
    case 2: return backward_steps<T, 2, kSilu>(p, w, at, blocks);
    case 3: return backward_steps<T, 3, kSilu>(p, w, at, blocks);
    case 4: return backward_steps<T, 4, kSilu>(p, w, at, blocks);
  }
}

template <typename T>
void backward_steps(const CausalConv1dBackward& p, const Workspace& w, const TilePosition& at, int64_t blocks) {
  return p.silu ? backward_steps<T, true>(p, w, at, blocks) : backward_steps<T, false>(p, w, at, blocks);
}

// The steps before the first: gradients earlier than it do not exist.
void write_initial_gradient(const CausalConv1dBackward& p, const Workspace& w, const Piece& piece, int64_t block,
                            const TilePosition& channels) {
  const int64_t context = p.width - 1;
  const float* const weight = w.weight + block * p.width * kLanes;
  const float* const gradient = w.carry + block * context * kLanes;
  for (int64_t t = 0; t < context; ++t) {
    Vec sum{};
    for (int64_t k = 0; k <= t; ++k) sum += load(weight + k * kLanes) * load(gradient + (t - k) * kLanes);
    store(w.states + t * kLanes, sum);
  }
  add_final_gradient(p, w, piece, channels, -context, context, {w.states, kLanes, false});
  float* const target = p.dinitial_states + piece.index * p.dim * context;
  write_matrix(target, context, channels.channel, channels.lanes, w.states);
}

void run(const CausalConv1dBackward& p, int64_t task, float* scratch) {
  Arena arena(scratch);
  const Workspace w(p, arena);
  const Channels channels(p, task);
  channels.pack(p, w.weight, w.bias);
  const int64_t blocks = channels.count(), context = p.width - 1;
  fill_zero(w.dweight, blocks * p.width * kLanes);
  fill_zero(w.dbias, blocks * kLanes);
  fill_zero(w.unused, (p.width + 1) * kLanes);
  const int64_t in_rows = blocks_in_rows(p, {&p.x, &p.dout, &p.dx}, channels);
  for_each_piece(p, task, [&](const Piece& piece) {
    fill_zero(w.carry, blocks * context * kLanes);
    const int64_t next = piece.end - piece.to < context ? piece.end : piece.to + context;
    backward_tiles(p, w, channels, 0, blocks, piece, piece.to, next);
    if (in_rows > 0) {
      const int64_t first = first_step_in_rows(p, piece);
      // those that are final states too
      int64_t last = p.dfinal_states.data && piece.end - context < piece.to ? piece.end - context : piece.to;
      if (last < first) last = first;
      backward_tiles(p, w, channels, 0, in_rows, piece, last, piece.to);
      TilePosition at{piece.batch, channels.begin, kLanes, last, kSteps};
      while (at.time - first >= kSteps) {
        at.time -= kSteps;
        switch (p.x.dtype) {
          case DType::kFloat32: backward_steps<float>(p, w, at, in_rows); break;
          case DType::kBFloat16: backward_steps<BFloat16>(p, w, at, in_rows); break;
          case DType::kFloat16: backward_steps<Float16>(p, w, at, in_rows); break;
        }
      }
      // with those left over: one at a time they would read and write the sums at each
      backward_tiles(p, w, channels, 0, in_rows, piece, piece.from, at.time);
    }
    backward_tiles(p, w, channels, in_rows, blocks, piece, piece.from, piece.to);
    if (!p.dinitial_states || p.width == 1 || piece.from > piece.begin) return;
    for (int64_t i = 0; i < blocks; ++i) {
      write_initial_gradient(p, w, piece, i, {0, channels.channel(i), channels.lanes(i), 0, 0});
    }
  });
  const int64_t group = p.partition.group(task);
  channels.unpack(p, w.dweight, p.dweight.data ? p.dweight.data + group * p.dweight.group_stride : nullptr);
  if (p.dbias.data) copy(p.dbias.data + group * p.dbias.group_stride + channels.begin, w.dbias, channels.end - channels.begin);
}

int64_t scratch_floats(const CausalConv1dBackward& p) {
  Arena arena(nullptr);
  Workspace(p, arena);
  return arena.used();
}

}  // namespace

extern const Kernel<CausalConv1dBackward> causal_conv1d_bwd;
const Kernel<CausalConv1dBackward> causal_conv1d_bwd{scratch_floats, run};

}  // namespace ssmtune::SSMTUNE_CPU_CAPABILITY
