#include "cpu/dispatch.h"
#include "cpu/selective_scan.h"

namespace ssmtune::SSMTUNE_CPU_CAPABILITY {
namespace {

inline constexpr int kStates = kStateGroup;

// Sums over the channels, for one step and kStates states, kept as vectors until the end of a chunk: add_halves is left to
// do where a vector is wider than that.
inline constexpr int kSumFloats = kLanes > kStates ? kLanes : kStates;

struct Workspace {
  Workspace(const SelectiveScanBackward& p, Arena& arena) {
    const int64_t channels = p.partition.max_range_channels();
    const int64_t matrix = channels * p.padded_states();
    A = arena.take(matrix);
    carry = arena.take(matrix);
    first_state = p.initial_state.data ? arena.take(matrix) : nullptr;
    offset = p.state_offset.data ? arena.take(matrix) : nullptr;
    dA = p.dA.data ? arena.take(matrix) : nullptr;
    dinitial_state = p.dinitial_state.data ? arena.take(matrix) : nullptr;
    doffset = p.dstate_offset.data ? arena.take(matrix) : nullptr;
    for (float** vector : {&smallest_decay, &largest_decay, &D, &delta_bias, &output_offset, &step_sum, &dD, &ddelta_bias,
                           &doutput_offset}) {
      *vector = arena.take(channels);
    }
    B = arena.take(state_rows_floats(p));
    C = arena.take(state_rows_floats(p));
    for (float** sums : {&dB, &dC}) {
      *sums = p.dBC ? arena.take(kChunk * p.padded_states() / kStates * kSumFloats) : nullptr;
    }
    for (float** tile : {&u, &delta, &z, &dout, &du, &ddelta, &dz, &dt, &dtu, &slope, &dy, &gate_slope, &y, &sum_decay, &sum_input}) {
      *tile = arena.take(kChunk * kLanes);
    }
    state_in = arena.take(p.padded_states() * kLanes);
    decay = arena.take(kChunk * kStates * kLanes);
    state = arena.take((kChunk + 1) * kStates * kLanes);
  }

  // Of the task's channels.
  float *A, *carry, *first_state, *offset, *dA, *dinitial_state, *doffset;
  float *smallest_decay, *largest_decay, *D, *delta_bias, *output_offset, *step_sum, *dD, *ddelta_bias, *doutput_offset;
  // Of a chunk.
  float *B, *C, *dB, *dC;
  // Of a tile.
  float *u, *delta, *z, *dout, *du, *ddelta, *dz, *dt, *dtu, *slope, *dy, *y;
  float* gate_slope;  // dz without its factor, the output
  float *sum_decay;  // sum over states of G a h_{t-1} A log2(e)
  float *sum_input;  // sum over states of G B
  float *state_in;
  float *decay, *state;  // a_t and h_t of a group of states: (steps, states, lanes); state starts a step earlier
};

// One block of channels over one chunk.
struct Tile {
  int64_t steps, padded_states;
  const float *A, *offset;
  StateRows B, C;
  const float* state_in;
  float *carry, *dA;
  Prefetch<4>* inputs;   // of the tile worked on next
  Prefetch<3>* outputs;  // of this one
};

// Adds four vectors' lanes up as far as a vector of eight such sums goes.
SSMTUNE_INLINE Vec sum_four(const Vec (&x)[4]) { return add_quads(add_pairs(x[0], x[1]), add_pairs(x[2], x[3])); }
SSMTUNE_INLINE void add_to_sums(float* sums, Vec first_four, Vec last_four) {
  if constexpr (kLanes == 4) {
    store(sums, load(sums) + first_four);
    store(sums + kLanes, load(sums + kLanes) + last_four);
  } else {
    store(sums, load(sums) + add_halves(first_four, last_four));
  }
}

// The forward recurrence over again for kStates states from n on, keeping a and h of every step.
__attribute__((noinline)) void recompute(const Tile& tile, const Workspace& w, int64_t n) {
  const float* const A = tile.A + n * kLanes;
  float *decay = w.decay, *state = w.state;
  const bool first = n == 0;

  Vec h[kStates];
  SSMTUNE_UNROLL
  for (int i = 0; i < kStates; ++i) {
    h[i] = load(tile.state_in + (n + i) * kLanes);
    store(state + i * kLanes, h[i]);
  }
  for (int64_t t = 0; t < tile.steps; ++t) {
    if (first) tile.inputs->step(t);
    const Vec dt = load(w.dt + t * kLanes), dtu = load(w.dtu + t * kLanes);
    const float* const B = tile.B[t] + n;
    state += kStates * kLanes;
    SSMTUNE_UNROLL
    for (int i = 0; i < kStates; ++i) {
      const Vec a = exp2(dt * load(A + i * kLanes));
      h[i] = a * h[i] + dtu * B[i];
      store(decay + i * kLanes, a);
      store(state + i * kLanes, h[i]);
    }
    decay += kStates * kLanes;
  }
}

// What is read from the states that recompute kept: dC and, if it is wanted, the output without its terms in u and
// output_offset. Apart from the recurrence, whose long chains of dependent instructions leave no room for more.
template <bool kOutput, bool kOffset>
__attribute__((noinline)) void read_out(const Tile& tile, const Workspace& w, int64_t n) {
  const float* const offset = kOffset ? tile.offset + n * kLanes : nullptr;
  const int64_t dC_stride = tile.padded_states / kStates * kSumFloats;
  float* const dC = w.dC ? w.dC + n / kStates * kSumFloats : nullptr;
  for (int64_t t = 0; t < tile.steps; ++t) {
    const float *const state = w.state + (t + 1) * kStates * kLanes, *const C = tile.C[t] + n;
    const Vec dy = load(w.dy + t * kLanes);
    Vec y[2] = {kOutput && n ? load(w.y + t * kLanes) : Vec{}, Vec{}};
    Vec sums[2];
    SSMTUNE_UNROLL
    for (int four = 0; four < 2; ++four) {
      Vec terms[4];
      SSMTUNE_UNROLL
      for (int k = 0; k < 4; ++k) {
        const int i = 4 * four + k;
        const Vec h = load(state + i * kLanes), seen = kOffset ? h + load(offset + i * kLanes) : h;
        terms[k] = dy * seen;
        if constexpr (kOutput) y[k % 2] += seen * C[i];
      }
      sums[four] = sum_four(terms);
    }
    if constexpr (kOutput) store(w.y + t * kLanes, y[0] + y[1]);
    if (dC) add_to_sums(dC + t * dC_stride, sums[0], sums[1]);
  }
}

// The adjoint recurrence, last step first, over what recompute kept.
template <bool kGradA>
__attribute__((noinline)) void reverse(const Tile& tile, const Workspace& w, int64_t n) {
  const float* const A = tile.A + n * kLanes;
  const int64_t dB_stride = tile.padded_states / kStates * kSumFloats;
  float* const dB = w.dB ? w.dB + n / kStates * kSumFloats : nullptr;
  const bool first = n == 0;

  Vec carry[kStates], dA[kStates], decay_rate[kStates];
  SSMTUNE_UNROLL
  for (int i = 0; i < kStates; ++i) {
    decay_rate[i] = load(A + i * kLanes);
    carry[i] = load(tile.carry + (n + i) * kLanes);
    if constexpr (kGradA) dA[i] = load(tile.dA + (n + i) * kLanes);
  }
  for (int64_t t = tile.steps - 1; t >= 0; --t) {
    if (first) tile.outputs->step(t);
    const Vec dt = load(w.dt + t * kLanes), dtu = load(w.dtu + t * kLanes), dy = load(w.dy + t * kLanes);
    const float *const B = tile.B[t] + n, *const C = tile.C[t] + n;
    const float* const decay = w.decay + t * kStates * kLanes;
    const float* const previous = w.state + t * kStates * kLanes;
    Vec sum_decay = first ? Vec{} : load(w.sum_decay + t * kLanes), sum_input = first ? Vec{} : load(w.sum_input + t * kLanes);
    Vec sums[2];
    SSMTUNE_UNROLL
    for (int four = 0; four < 2; ++four) {
      Vec terms[4];
      SSMTUNE_UNROLL
      for (int k = 0; k < 4; ++k) {
        const int i = 4 * four + k;
        const Vec adjoint = dy * C[i] + carry[i];
        terms[k] = adjoint * dtu;
        sum_input += adjoint * B[i];
        carry[i] = adjoint * load(decay + i * kLanes);
        const Vec q = carry[i] * load(previous + i * kLanes);
        sum_decay += q * decay_rate[i];
        if constexpr (kGradA) dA[i] += q * dt;
      }
      sums[four] = sum_four(terms);
    }
    store(w.sum_decay + t * kLanes, sum_decay);
    store(w.sum_input + t * kLanes, sum_input);
    if (dB) add_to_sums(dB + t * dB_stride, sums[0], sums[1]);
  }
  SSMTUNE_UNROLL
  for (int i = 0; i < kStates; ++i) {
    store(tile.carry + (n + i) * kLanes, carry[i]);
    if constexpr (kGradA) store(tile.dA + (n + i) * kLanes, dA[i]);
  }
}

template <bool kOutput, bool kOffset, bool kGradA>
void scan(const Tile& tile, const Workspace& w) {
  for (int64_t n = 0; n < tile.padded_states; n += kStates) {
    recompute(tile, w, n);
    if (kOutput || w.dC) read_out<kOutput, kOffset>(tile, w, n);
    reverse<kGradA>(tile, w, n);
  }
}

using Scan = void (*)(const Tile&, const Workspace&);
Scan choose_scan(bool output, bool offset, bool grad_A) {
  constexpr Scan kScans[2][2][2] = {{{scan<false, false, false>, scan<false, false, true>},
                                     {scan<false, true, false>, scan<false, true, true>}},
                                    {{scan<true, false, false>, scan<true, false, true>},
                                     {scan<true, true, false>, scan<true, true, true>}}};
  return kScans[output][offset][grad_A];
}

// The sums of a chunk as rows of states.
void write_sums(const float* sums, int64_t steps, int64_t padded_states, float* rows, int64_t row_stride) {
  const int64_t groups = padded_states / kStates;
  for (int64_t t = 0; t < steps; ++t, sums += groups * kSumFloats, rows += row_stride) {
    if constexpr (kLanes <= kStates) {
      copy(rows, sums, padded_states);
    } else {
      for (int64_t group = 0; group < groups; group += 2) {
        const Vec last = load(sums + (group + 1 < groups ? group + 1 : group) * kSumFloats);
        store_first(rows + group * kStates, add_halves(load(sums + group * kSumFloats), last), group + 1 < groups ? 16 : 8);
      }
    }
  }
}

// The gradient of a state offset over a tile, sum_t dy_t C_t[n]: a matrix product.
void accumulate_offset(const StateRows& C, const float* dy, int64_t steps, int64_t padded_states, float* doffset) {
  for (int64_t n = 0; n < padded_states; n += kStates) {
    Vec sum[kStates];
    SSMTUNE_UNROLL
    for (int i = 0; i < kStates; ++i) sum[i] = load(doffset + (n + i) * kLanes);
    for (int64_t t = 0; t < steps; ++t) {
      const Vec g = load(dy + t * kLanes);
      SSMTUNE_UNROLL
      for (int i = 0; i < kStates; ++i) sum[i] += g * C[t][n + i];
    }
    SSMTUNE_UNROLL
    for (int i = 0; i < kStates; ++i) store(doffset + (n + i) * kLanes, sum[i]);
  }
}

// The rows of one block of channels, worked on as T.
template <typename T>
struct BlockRows {
  int64_t steps;
  Rows<const T> u, delta, z, dout;
  Rows<T> du, ddelta, dz;
};

// What depends on the step and the channel alone: dt, dt u, the slope of softplus, dy, and dz without its factor, the output.
template <typename T>
void prepare(const SelectiveScanBackward& p, const Workspace& w, const ChannelBlocks& blocks, int64_t block,
             const BlockRows<T>& rows) {
  const Vec smallest_decay = load(w.smallest_decay + block * kLanes), largest_decay = load(w.largest_decay + block * kLanes);
  const Vec bias = load(w.delta_bias + block * kLanes);
  const bool may_grow = blocks.may_grow(p, w.largest_decay, block);
  const bool has_dout = p.dout.data != nullptr, has_z = p.z.data != nullptr;
  Vec step_sum = load(w.step_sum + block * kLanes);
  for (int64_t t = 0; t < rows.steps; ++t) {
    const int64_t row = t * kLanes;
    Vec dt = load(rows.delta[t]) + bias, slope = broadcast(1.0f);
    if (p.delta_softplus) {
      const Vec e = exp_negative_abs(dt);
      slope = sigmoid(dt, e);
      dt = softplus(dt, e);
    }
    store(w.slope + row, slope);
    store(w.dtu + row, dt * load(rows.u[t]));
    if (may_grow) dt = bounded_step(dt, smallest_decay, largest_decay);
    store(w.dt + row, dt);
    step_sum += dt;

    Vec dy = has_dout ? load(rows.dout[t]) : Vec{};
    if (has_z) {
      const Vec gate = load(rows.z[t]), s = sigmoid(gate);
      store(w.gate_slope + row, dy * s * (1.0f + gate * (1.0f - s)));
      dy *= gate * s;
    }
    store(w.dy + row, dy);
  }
  store(w.step_sum + block * kLanes, step_sum);
}

template <typename T>
void finish(const Workspace& w, int64_t block, const BlockRows<T>& rows, bool has_dz) {
  const Vec D = load(w.D + block * kLanes), output_offset = load(w.output_offset + block * kLanes);
  Vec dD{}, ddelta_bias{}, doutput_offset{};
  for (int64_t t = 0; t < rows.steps; ++t) {
    const int64_t row = t * kLanes;
    const Vec value = load(rows.u[t]), dy = load(w.dy + row), sum_input = load(w.sum_input + row);
    const Vec ddelta = (value * sum_input + load(w.sum_decay + row) * kLn2) * load(w.slope + row);
    store(rows.du[t], load(w.dt + row) * sum_input + D * dy);
    store(rows.ddelta[t], ddelta);
    if (has_dz) store(rows.dz[t], load(w.gate_slope + row) * (load(w.y + row) + D * value + output_offset));
    dD += dy * value;
    ddelta_bias += ddelta;
    doutput_offset += dy;
  }
  const auto add = [block](float* sums, Vec x) { store(sums + block * kLanes, load(sums + block * kLanes) + x); };
  add(w.dD, dD);
  add(w.ddelta_bias, ddelta_bias);
  add(w.doutput_offset, doutput_offset);
}

// The state before a chunk, for all padded states.
const float* state_before(const SelectiveScanBackward& p, const Workspace& w, const ChannelBlocks& blocks, int64_t block,
                          bool first, int64_t chunk) {
  if (first && w.first_state) return w.first_state + block * blocks.matrix_size();
  const int64_t known = first ? 0 : p.dstate * kLanes;
  const float* const saved = first ? nullptr : blocks.chunk_state(p, chunk - 1, block);
  if (known == blocks.matrix_size()) return saved;
  copy(w.state_in, saved, known);
  fill_zero(w.state_in + known, blocks.matrix_size() - known);
  return w.state_in;
}

template <typename T>
void run_block(const SelectiveScanBackward& p, const Workspace& w, const ChannelBlocks& blocks, int64_t i,
               const TilePosition& at, Scan scan, const Tile& tile) {
  const BlockRows<T> rows{at.steps,
                          input_rows<T>(p.u, at, w.u),
                          input_rows<T>(p.delta, at, w.delta),
                          input_rows<T>(p.z, at, w.z),
                          input_rows<T>(p.dout, at, w.dout),
                          output_rows<T>(p.du, at, w.du),
                          output_rows<T>(p.ddelta, at, w.ddelta),
                          output_rows<T>(p.dz, at, w.dz)};
  prepare<T>(p, w, blocks, i, rows);
  scan(tile, w);
  finish<T>(w, i, rows, p.dz.data != nullptr);
  finish_rows(p.du, at, rows.du);
  finish_rows(p.ddelta, at, rows.ddelta);
  finish_rows(p.dz, at, rows.dz);
}

// One chunk of a row from the step `time` on; the state before it, unless it is the first, is kept as that of `chunk` - 1.
void run_chunk(const SelectiveScanBackward& p, const Workspace& w, const ChannelBlocks& blocks, const Row& row, int64_t time,
               int64_t chunk, float* dBC) {
  const int64_t steps = row.end - time < kChunk ? row.end - time : kChunk;
  const StateRows B = state_rows(p, p.B, blocks.section(), row.batch, time, steps, w.B);
  const StateRows C = state_rows(p, p.C, blocks.section(), row.batch, time, steps, w.C);
  if (dBC) {
    const int64_t sums = steps * p.padded_states() / kStates * kSumFloats;
    fill_zero(w.dB, sums);
    fill_zero(w.dC, sums);
  }
  const Scan scan = choose_scan(p.dz.data, w.offset, w.dA);
  for (int64_t i = 0; i < blocks.count(); ++i) {
    const TilePosition at{row.batch, blocks.channel(i), blocks.lanes(i), time, steps};
    const int64_t matrix = i * blocks.matrix_size();
    const bool first = time == row.begin && p.begins_sequence(row);
    const float* const next_state = first || i + 1 == blocks.count() ? nullptr : blocks.chunk_state(p, chunk - 1, i + 1);
    Prefetch<4> inputs({&p.u, &p.delta, &p.z, &p.dout}, blocks.next_tile(row, at, i + 1, -kChunk), next_state);
    Prefetch<3> outputs({&p.du, &p.ddelta, &p.dz}, at);
    const Tile tile{steps, p.padded_states(), w.A + matrix, w.offset ? w.offset + matrix : nullptr, B, C,
                    state_before(p, w, blocks, i, first, chunk), w.carry + matrix, w.dA ? w.dA + matrix : nullptr,
                    &inputs, &outputs};
    switch (rows_dtype({&p.u, &p.delta, &p.z, &p.dout, &p.du, &p.ddelta, &p.dz}, at)) {
      case DType::kFloat32: run_block<float>(p, w, blocks, i, at, scan, tile); break;
      case DType::kBFloat16: run_block<BFloat16>(p, w, blocks, i, at, scan, tile); break;
      case DType::kFloat16: run_block<Float16>(p, w, blocks, i, at, scan, tile); break;
    }
    if (w.doffset) accumulate_offset(C, w.dy, steps, p.padded_states(), w.doffset + matrix);
  }
  if (dBC) {
    const int64_t stride = 2 * p.padded_states();
    write_sums(w.dB, steps, p.padded_states(), dBC + time * stride, stride);
    write_sums(w.dC, steps, p.padded_states(), dBC + time * stride + p.padded_states(), stride);
  }
}

void add(float* sum, const float* x, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) store(sum + i, load(sum + i) + load(x + i));
}

void run(const SelectiveScanBackward& p, int64_t task, float* scratch) {
  const FlushSubnormals flush;
  Arena arena(scratch);
  const Workspace w(p, arena);
  const ChannelBlocks blocks(p, task);
  const int64_t vector_floats = blocks.count() * kLanes, matrix_floats = blocks.count() * blocks.matrix_size();
  const int64_t group = p.partition.group(task);
  for (float* sum : {w.dA, w.dinitial_state, w.doffset}) {
    if (sum) fill_zero(sum, matrix_floats);
  }
  for (float* sum : {w.dD, w.ddelta_bias, w.doutput_offset}) fill_zero(sum, vector_floats);
  blocks.pack_decay(p.A, w.A, w.smallest_decay, w.largest_decay);
  blocks.pack_vector(p.D, w.D);
  blocks.pack_vector(p.delta_bias, w.delta_bias);

  const int64_t first_row = p.partition.batch_begin(task);
  for (int64_t r = first_row; r < p.partition.batch_end(task); ++r) {
    const bool first = r == first_row;
    const int64_t sequence = p.sequence(r);
    if (w.offset && (first || p.state_offset.batch_stride)) {
      blocks.pack_matrix(p.state_offset.data + sequence * p.state_offset.batch_stride, w.offset);
    }
    if (first || p.output_offset.batch_stride) {
      const float* const offset = p.output_offset.data;
      blocks.pack_vector(offset ? offset + sequence * p.output_offset.batch_stride : nullptr, w.output_offset);
    }
    if (w.first_state && (first || p.initial_state.batch_stride)) {
      blocks.pack_matrix(p.initial_state.data + sequence * p.initial_state.batch_stride, w.first_state);
    }
    if (p.dlast_state) {
      blocks.pack_matrix(p.dlast_state + r * p.dim * p.dstate, w.carry);
    } else {
      fill_zero(w.carry, matrix_floats);
    }

    fill_zero(w.step_sum, vector_floats);
    const Row row = p.row(r);
    float* dBC = p.dBC;
    if (dBC) dBC += (row.batch * p.partition.ranges + p.partition.range(task)) * p.seqlen * 2 * p.padded_states();
    for (int64_t chunk = (row.end - row.begin - 1) / kChunk; chunk >= 0; --chunk) {
      run_chunk(p, w, blocks, row, row.begin + chunk * kChunk, p.first_chunk(r) + chunk, dBC);
    }

    if (p.step_sums) blocks.unpack_vector(w.step_sum, p.step_sums + r * p.dim);
    if (p.dfirst_state) blocks.unpack_matrix(w.carry, p.dfirst_state + r * p.dim * p.dstate);
    if (p.dinitial_state.data && p.begins_sequence(row)) {
      if (p.dinitial_state.batch_stride) {
        blocks.unpack_matrix(w.carry, p.dinitial_state.data + sequence * p.dinitial_state.batch_stride);
      } else {
        add(w.dinitial_state, w.carry, matrix_floats);
      }
    }
    if (p.dstate_offset.batch_stride) {
      blocks.unpack_matrix(w.doffset, p.dstate_offset.data + r * p.dstate_offset.batch_stride);
      fill_zero(w.doffset, matrix_floats);
    }
    if (p.doutput_offset.batch_stride) {
      blocks.unpack_vector(w.doutput_offset, p.doutput_offset.data + r * p.doutput_offset.batch_stride);
      fill_zero(w.doutput_offset, vector_floats);
    }
  }

  const auto write_matrix_sum = [&](const ChannelGradient& target, const float* sum) {
    if (target.data && !target.batch_stride) blocks.unpack_matrix(sum, target.data + group * target.group_stride);
  };
  const auto write_vector_sum = [&](const ChannelGradient& target, const float* sum) {
    if (target.data && !target.batch_stride) blocks.unpack_vector(sum, target.data + group * target.group_stride);
  };
  write_matrix_sum(p.dA, w.dA);
  write_matrix_sum(p.dinitial_state, w.dinitial_state);
  write_matrix_sum(p.dstate_offset, w.doffset);
  write_vector_sum(p.dD, w.dD);
  write_vector_sum(p.ddelta_bias, w.ddelta_bias);
  write_vector_sum(p.doutput_offset, w.doutput_offset);
}

int64_t scratch_floats(const SelectiveScanBackward& p) {
  Arena arena(nullptr);
  Workspace(p, arena);
  return arena.used();
}

}  // namespace

extern const Kernel<SelectiveScanBackward> selective_scan_bwd;
const Kernel<SelectiveScanBackward> selective_scan_bwd{scratch_floats, run};

}  // namespace ssmtune::SSMTUNE_CPU_CAPABILITY
