#include "cpu/dispatch.h"
#include "cpu/tile.h"

namespace ssmtune::SSMTUNE_CPU_CAPABILITY {
namespace {

// The task's channels in blocks of kLanes, with weight and bias as vectors: (blocks, width, lanes) and (blocks, lanes).
struct Channels {
  Channels(const CausalConv1dParams& p, int64_t task)
      : begin(p.partition.channel_begin(task)), end(p.partition.channel_end(task)) {}

  int64_t count() const { return (end - begin + kLanes - 1) / kLanes; }
  int64_t channel(int64_t block) const { return begin + block * kLanes; }
  int64_t lanes(int64_t block) const { return lanes_left(channel(block), end); }

  void pack(const CausalConv1dParams& p, float* weight, float* bias) const {
    for (int64_t i = 0; i < count(); ++i) {
      read_matrix(p.weight, p.width, channel(i), lanes(i), weight + i * p.width * kLanes);
      store(bias + i * kLanes, p.bias ? load_first(p.bias + channel(i), lanes(i)) : Vec{});
    }
  }

  int64_t begin, end;
};

// One sequence, and where its rows of the states before it and after it are.
struct Sequence : CausalConv1dParams::Sequence {
  Sequence(const CausalConv1dParams& p, int64_t i) : CausalConv1dParams::Sequence(p.sequence(i)), index(i) {}
  int64_t steps() const { return end - begin; }
  int64_t index;
};

// The rows of x a tile needs: those of its steps and, before them, the width - 1 they look back to.
Rows<const float> rows_with_context(const CausalConv1dParams& p, const Sequence& sequence, const TilePosition& at,
                                    float* buffer) {
  const int64_t context = p.width - 1, passed = at.time - sequence.begin;
  const int64_t earlier = passed < context ? passed : context;
  TilePosition from = at;
  from.time -= earlier;
  from.steps += earlier;
  if (earlier == context && is_direct(p.x, at)) return {address(p.x, from), p.x.stride, true};
  const int64_t missing = context - earlier;
  if (p.initial_states) {
    const float* const states = p.initial_states + sequence.index * p.dim * context;
    read_tile(matrix(states, context), {0, at.channel, at.lanes, passed, missing}, buffer, kLanes);
  } else {
    fill_zero(buffer, missing * kLanes);
  }
  read_tile(p.x, from, buffer + missing * kLanes, kLanes);
  return {buffer, kLanes, false};
}

// Width 0 stands for one known at run time only.
template <int kWidth>
SSMTUNE_INLINE Vec convolve(const Rows<const float>& x, int64_t t, const float* weight, Vec bias, int64_t width) {
  Vec y = bias;
  if constexpr (kWidth > 0) width = kWidth;
  SSMTUNE_UNROLL
  for (int64_t k = 0; k < width; ++k) y += load(weight + k * kLanes) * load(x[t + k]);
  return y;
}

template <int kWidth>
void forward_tile(const CausalConv1dForward& p, const Rows<const float>& x, const float* weight, Vec bias, const Rows<float>& out,
                  int64_t steps) {
  for (int64_t t = 0; t < steps; ++t) {
    if (x.direct) __builtin_prefetch(x[t + p.width - 1] + kLanes);
    Vec y = convolve<kWidth>(x, t, weight, bias, p.width);
    if (p.silu) y *= sigmoid(y);
    store(out[t], y);
  }
}

struct ForwardWorkspace {
  ForwardWorkspace(const CausalConv1dParams& p, Arena& arena) {
    const int64_t channels = p.partition.max_range_channels();
    weight = arena.take(channels * p.width);
    bias = arena.take(channels);
    x = arena.take((p.width - 1 + kChunk) * kLanes);
    out = arena.take(kChunk * kLanes);
  }
  float *weight, *bias, *x, *out;
};

void run_forward(const CausalConv1dForward& p, int64_t task, float* scratch) {
  Arena arena(scratch);
  const ForwardWorkspace w(p, arena);
  const Channels channels(p, task);
  channels.pack(p, w.weight, w.bias);
  for (int64_t index = p.partition.batch_begin(task); index < p.partition.batch_end(task); ++index) {
    const Sequence sequence(p, index);
    for (int64_t time = sequence.begin; time < sequence.end; time += kChunk) {
      const int64_t steps = sequence.end - time < kChunk ? sequence.end - time : kChunk;
      for (int64_t i = 0; i < channels.count(); ++i) {
        const TilePosition at{sequence.batch, channels.channel(i), channels.lanes(i), time, steps};
        const Rows<const float> x = rows_with_context(p, sequence, at, w.x);
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
    if (!p.final_states.data) continue;
    for (int64_t i = 0; i < channels.count(); ++i) {
      const TilePosition end{sequence.batch, channels.channel(i), channels.lanes(i), sequence.end, 0};
      const Rows<const float> states = rows_with_context(p, sequence, end, w.x);
      write_tile(p.final_states, {index, end.channel, end.lanes, 0, p.width - 1}, states.data, states.stride);
    }
  }
}

struct BackwardWorkspace : ForwardWorkspace {
  BackwardWorkspace(const CausalConv1dBackward& p, Arena& arena) : ForwardWorkspace(p, arena) {
    const int64_t channels = p.partition.max_range_channels(), context = p.width - 1;
    dweight = arena.take(channels * p.width);
    dbias = arena.take(channels);
    carry = arena.take(channels * context);
    dout = arena.take(kChunk * kLanes);
    dinitial_states = arena.take(context * kLanes);
    gradient = arena.take((kChunk + context) * kLanes);
    dfinal_states = arena.take(context * kLanes);
  }
  float *dweight, *dbias;
  float* carry;  // the gradients of the first width - 1 steps after the chunk
  float *dout, *dinitial_states;
  float* gradient;  // of the convolution before SiLU, followed by the carried rows
  float* dfinal_states;
};

// The gradient before SiLU, and what it adds to those of weight and bias.
template <int kWidth>
void gradient_tile(const CausalConv1dBackward& p, const Rows<const float>& x, const float* weight, Vec bias,
                   const Rows<const float>& dout, const BackwardWorkspace& w, int64_t block, int64_t steps) {
  float* const dweight = w.dweight + block * p.width * kLanes;
  const int64_t width = kWidth > 0 ? kWidth : p.width;
  Vec sums[kWidth > 0 ? kWidth : 1] = {};
  Vec dbias = load(w.dbias + block * kLanes);
  for (int64_t t = 0; t < steps; ++t) {
    if (x.direct) __builtin_prefetch(x[t + width - 1] + kLanes);
    if (dout.direct) __builtin_prefetch(dout[t] + kLanes);
    Vec g = load(dout[t]);
    if (p.silu) {
      const Vec y = convolve<kWidth>(x, t, weight, bias, p.width), s = sigmoid(y);
      g *= s * (1.0f + y * (1.0f - s));
    }
    store(w.gradient + t * kLanes, g);
    dbias += g;
    if constexpr (kWidth > 0) {
      SSMTUNE_UNROLL
      for (int k = 0; k < kWidth; ++k) sums[k] += g * load(x[t + k]);
    } else {
      for (int64_t k = 0; k < width; ++k) store(dweight + k * kLanes, load(dweight + k * kLanes) + g * load(x[t + k]));
    }
  }
  store(w.dbias + block * kLanes, dbias);
  if constexpr (kWidth > 0) {
    SSMTUNE_UNROLL
    for (int k = 0; k < kWidth; ++k) store(dweight + k * kLanes, load(dweight + k * kLanes) + sums[k]);
  }
}

// dx_t = sum_k weight_k gradient_{t + width - 1 - k}
template <int kWidth>
void input_gradient_tile(const BackwardWorkspace& w, const float* weight, int64_t width, const Rows<float>& dx, int64_t steps) {
  if constexpr (kWidth > 0) width = kWidth;
  for (int64_t t = 0; t < steps; ++t) {
    Vec sum{};
    SSMTUNE_UNROLL
    for (int64_t k = 0; k < width; ++k) sum += load(weight + k * kLanes) * load(w.gradient + (t + width - 1 - k) * kLanes);
    store(dx[t], sum);
  }
}

// The final states are inputs: step t of the sequence is the state t - steps + width - 1, and adds its gradient to that
// of the input. Adds those of `count` steps from `first` on, which may be negative for steps before the sequence.
void add_final_gradient(const CausalConv1dBackward& p, const BackwardWorkspace& w, const Sequence& sequence,
                        const TilePosition& channels, int64_t first, int64_t count, const Rows<float>& rows) {
  if (!p.dfinal_states.data) return;
  const int64_t shift = p.width - 1 - sequence.steps();
  const int64_t begin = first + shift < 0 ? -shift : first;
  const int64_t steps = first + count - begin;
  if (steps <= 0) return;
  read_tile(p.dfinal_states, {sequence.index, channels.channel, channels.lanes, begin + shift, steps}, w.dfinal_states, kLanes);
  for (int64_t t = 0; t < steps; ++t) {
    float* const row = rows[begin - first + t];
    store(row, load(row) + load(w.dfinal_states + t * kLanes));
  }
}

template <int kWidth>
void backward_tile(const CausalConv1dBackward& p, const BackwardWorkspace& w, const Sequence& sequence, int64_t block,
                   const TilePosition& at) {
  const int64_t context = p.width - 1;
  const float* const weight = w.weight + block * p.width * kLanes;
  float* const carry = w.carry + block * context * kLanes;
  const Rows<const float> x = rows_with_context(p, sequence, at, w.x), dout = input_rows(p.dout, at, w.dout);
  gradient_tile<kWidth>(p, x, weight, load(w.bias + block * kLanes), dout, w, block, at.steps);
  copy(w.gradient + at.steps * kLanes, carry, context * kLanes);
  if (p.dx.data) {
    const Rows<float> dx = output_rows(p.dx, at, w.out);
    input_gradient_tile<kWidth>(w, weight, p.width, dx, at.steps);
    add_final_gradient(p, w, sequence, at, at.time - sequence.begin, at.steps, dx);
    finish_rows(p.dx, at, dx);
  }
  copy(carry, w.gradient, context * kLanes);
}

// The steps before the first: gradients earlier than it do not exist.
void write_initial_gradient(const CausalConv1dBackward& p, const BackwardWorkspace& w, const Sequence& sequence, int64_t block,
                            const TilePosition& channels) {
  const int64_t context = p.width - 1;
  const float* const weight = w.weight + block * p.width * kLanes;
  const float* const gradient = w.carry + block * context * kLanes;
  for (int64_t t = 0; t < context; ++t) {
    Vec sum{};
    for (int64_t k = 0; k <= t; ++k) sum += load(weight + k * kLanes) * load(gradient + (t - k) * kLanes);
    store(w.dinitial_states + t * kLanes, sum);
  }
  add_final_gradient(p, w, sequence, channels, -context, context, {w.dinitial_states, kLanes, false});
  float* const target = p.dinitial_states + sequence.index * p.dim * context;
  write_matrix(target, context, channels.channel, channels.lanes, w.dinitial_states);
}

void run_backward(const CausalConv1dBackward& p, int64_t task, float* scratch) {
  Arena arena(scratch);
  const BackwardWorkspace w(p, arena);
  const Channels channels(p, task);
  channels.pack(p, w.weight, w.bias);
  fill_zero(w.dweight, channels.count() * p.width * kLanes);
  fill_zero(w.dbias, channels.count() * kLanes);
  for (int64_t index = p.partition.batch_begin(task); index < p.partition.batch_end(task); ++index) {
    const Sequence sequence(p, index);
    const int64_t chunks = (sequence.steps() + kChunk - 1) / kChunk;
    fill_zero(w.carry, channels.count() * (p.width - 1) * kLanes);
    for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
      const int64_t time = sequence.begin + chunk * kChunk;
      const int64_t steps = sequence.end - time < kChunk ? sequence.end - time : kChunk;
      for (int64_t i = 0; i < channels.count(); ++i) {
        const TilePosition at{sequence.batch, channels.channel(i), channels.lanes(i), time, steps};
        switch (p.width) {
          case 2: backward_tile<2>(p, w, sequence, i, at); break;
          case 3: backward_tile<3>(p, w, sequence, i, at); break;
          case 4: backward_tile<4>(p, w, sequence, i, at); break;
          default: backward_tile<0>(p, w, sequence, i, at);
        }
      }
    }
    if (!p.dinitial_states || p.width == 1) continue;
    for (int64_t i = 0; i < channels.count(); ++i) {
      write_initial_gradient(p, w, sequence, i, {0, channels.channel(i), channels.lanes(i), 0, 0});
    }
  }
  const int64_t group = p.partition.group(task);
  for (int64_t i = 0; i < channels.count(); ++i) {
    const int64_t channel = channels.channel(i), lanes = channels.lanes(i);
    if (p.dweight.data) {
      float* const target = p.dweight.data + group * p.dweight.group_stride;
      write_matrix(target, p.width, channel, lanes, w.dweight + i * p.width * kLanes);
    }
    if (p.dbias.data) {
      store_first(p.dbias.data + group * p.dbias.group_stride + channel, load(w.dbias + i * kLanes), lanes);
    }
  }
}

template <typename Workspace, typename Params>
int64_t scratch_floats(const Params& p) {
  Arena arena(nullptr);
  Workspace(p, arena);
  return arena.used();
}

}  // namespace

extern const Kernel<CausalConv1dForward> causal_conv1d_fwd;
extern const Kernel<CausalConv1dBackward> causal_conv1d_bwd;
const Kernel<CausalConv1dForward> causal_conv1d_fwd{scratch_floats<ForwardWorkspace, CausalConv1dForward>, run_forward};
const Kernel<CausalConv1dBackward> causal_conv1d_bwd{scratch_floats<BackwardWorkspace, CausalConv1dBackward>, run_backward};

}  // namespace ssmtune::SSMTUNE_CPU_CAPABILITY
