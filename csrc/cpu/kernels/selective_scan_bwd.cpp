#include "cpu/dispatch.h"
#include "cpu/selective_scan.h"

namespace ssmtune::SSMTUNE_CPU_CAPABILITY {
namespace {

// Blocks of channels worked on together: the lanes of dB and dC are added up once for all of them.
inline constexpr int kBlocks = kLanes == 16 ? 2 : 1;
inline constexpr int kStates = kStateGroup;
static_assert(Partition::kUnit % (kBlocks * kLanes) == 0);

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
    for (float** vector : {&smallest_decay, &largest_decay, &D, &delta_bias, &output_offset, &dD, &ddelta_bias, &doutput_offset}) {
      *vector = arena.take(channels);
    }
    B = arena.take(state_rows_floats(p));
    C = arena.take(state_rows_floats(p));
    for (float** sums : {&dB, &dC}) {
      *sums = p.dBC ? arena.take(kChunk * p.padded_states() / kStates * kSumFloats) : nullptr;
    }
    for (int i = 0; i < kBlocks; ++i) {
      for (float** tile : {&u[i], &delta[i], &z[i], &dout[i], &du[i], &ddelta[i], &dz[i]}) {
        *tile = arena.take(kChunk * kLanes);
      }
    }
    constexpr int64_t kRows = kChunk * kBlocks * kLanes;
    for (float** rows : {&dt, &dtu, &slope, &dy, &y, &sum_decay, &sum_input}) *rows = arena.take(kRows);
    state_in = arena.take(kBlocks * p.padded_states() * kLanes);
    decay = arena.take(kRows * kStates);
    state = arena.take(kRows * kStates + kBlocks * kLanes * kStates);
  }

  // Of the task's channels.
  float *A, *carry, *first_state, *offset, *dA, *dinitial_state, *doffset;
  float *smallest_decay, *largest_decay, *D, *delta_bias, *output_offset, *dD, *ddelta_bias, *doutput_offset;
  // Of a chunk.
  float *B, *C, *dB, *dC;
  // Of a tile: (steps, lanes) for tensors, (steps, blocks, lanes) for what is computed.
  float *u[kBlocks], *delta[kBlocks], *z[kBlocks], *dout[kBlocks], *du[kBlocks], *ddelta[kBlocks], *dz[kBlocks];
  float *dt, *dtu, *slope, *dy, *y;
  float *sum_decay;  // sum over states of G a h_{t-1} A log2(e)
  float *sum_input;  // sum over states of G B
  float *state_in;
  float *decay, *state;  // a_t and h_t of a group of states: (steps, blocks, states, lanes); state starts a step earlier
};

// kBlocks blocks of channels over one chunk. Pointers to matrices are those of the first block.
struct Tile {
  int64_t steps, padded_states, matrix_size;
  const float *A, *offset;
  StateRows B, C;
  const float* state_in;
  float *carry, *dA;
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

// The forward recurrence over again for kStates states from n on, keeping a and h of every step; dC; and, if it is wanted,
// the output without its terms in u and output_offset.
template <bool kOutput, bool kOffset>
__attribute__((noinline)) void recompute(const Tile& tile, const Workspace& w, int64_t n) {
  const float* const A = tile.A + n * kLanes;
  const float* const offset = kOffset ? tile.offset + n * kLanes : nullptr;
  const float *const B = tile.B.data + n, *const C = tile.C.data + n;
  const int64_t matrix_size = tile.matrix_size, B_stride = tile.B.stride, C_stride = tile.C.stride;
  const int64_t dC_stride = tile.padded_states / kStates * kSumFloats;
  const float *dt = w.dt, *dtu = w.dtu, *dy = w.dy;
  float *decay = w.decay, *state = w.state, *y = w.y;
  float* dC_sums = w.dC ? w.dC + n / kStates * kSumFloats : nullptr;
  const bool first = n == 0;

  Vec h[kBlocks][kStates];
  SSMTUNE_UNROLL
  for (int j = 0; j < kBlocks; ++j) {
    SSMTUNE_UNROLL
    for (int i = 0; i < kStates; ++i) {
      h[j][i] = load(tile.state_in + j * matrix_size + (n + i) * kLanes);
      store(state + (j * kStates + i) * kLanes, h[j][i]);
    }
  }
  for (int64_t t = 0; t < tile.steps; ++t) {
    state += kBlocks * kStates * kLanes;
    Vec dt_t[kBlocks], dtu_t[kBlocks], dy_t[kBlocks], output[kBlocks], dC[2];
    SSMTUNE_UNROLL
    for (int j = 0; j < kBlocks; ++j) {
      dt_t[j] = load(dt + j * kLanes);
      dtu_t[j] = load(dtu + j * kLanes);
      dy_t[j] = load(dy + j * kLanes);
      output[j] = kOutput && !first ? load(y + j * kLanes) : Vec{};
    }
    SSMTUNE_UNROLL
    for (int four = 0; four < 2; ++four) {
      Vec terms[4];
      SSMTUNE_UNROLL
      for (int k = 0; k < 4; ++k) {
        const int i = 4 * four + k;
        SSMTUNE_UNROLL
        for (int j = 0; j < kBlocks; ++j) {
          const Vec a = exp2(dt_t[j] * load(A + j * matrix_size + i * kLanes));
          h[j][i] = a * h[j][i] + dtu_t[j] * B[t * B_stride + i];
          store(decay + (j * kStates + i) * kLanes, a);
          store(state + (j * kStates + i) * kLanes, h[j][i]);
          const Vec seen = kOffset ? h[j][i] + load(offset + j * matrix_size + i * kLanes) : h[j][i];
          const Vec term = dy_t[j] * seen;
          terms[k] = j == 0 ? term : terms[k] + term;
          if constexpr (kOutput) output[j] += seen * C[t * C_stride + i];
        }
      }
      dC[four] = sum_four(terms);
    }
    if (dC_sums) add_to_sums(dC_sums + t * dC_stride, dC[0], dC[1]);
    if constexpr (kOutput) {
      SSMTUNE_UNROLL
      for (int j = 0; j < kBlocks; ++j) store(y + j * kLanes, output[j]);
    }
    decay += kBlocks * kStates * kLanes;
    dt += kBlocks * kLanes, dtu += kBlocks * kLanes, dy += kBlocks * kLanes, y += kBlocks * kLanes;
  }
}

// The adjoint recurrence, last step first, over what recompute kept.
template <bool kGradA>
__attribute__((noinline)) void reverse(const Tile& tile, const Workspace& w, int64_t n) {
  const float* const A = tile.A + n * kLanes;
  const float *const B = tile.B.data + n, *const C = tile.C.data + n;
  const int64_t matrix_size = tile.matrix_size, B_stride = tile.B.stride, C_stride = tile.C.stride;
  const int64_t dB_stride = tile.padded_states / kStates * kSumFloats;
  float* const dB_sums = w.dB ? w.dB + n / kStates * kSumFloats : nullptr;
  const bool first = n == 0;

  Vec carry[kBlocks][kStates], dA[kBlocks][kStates];
  SSMTUNE_UNROLL
  for (int j = 0; j < kBlocks; ++j) {
    SSMTUNE_UNROLL
    for (int i = 0; i < kStates; ++i) {
      const int64_t at = j * matrix_size + (n + i) * kLanes;
      carry[j][i] = load(tile.carry + at);
      if constexpr (kGradA) dA[j][i] = load(tile.dA + at);
    }
  }
  for (int64_t t = tile.steps - 1; t >= 0; --t) {
    const int64_t row = t * kBlocks * kLanes;
    const float* const decay = w.decay + row * kStates;
    const float* const previous = w.state + row * kStates;
    float *const sum_decay = w.sum_decay + row, *const sum_input = w.sum_input + row;
    Vec dt[kBlocks], dtu[kBlocks], dy[kBlocks], decay_terms[kBlocks], input_terms[kBlocks], dB[2];
    SSMTUNE_UNROLL
    for (int j = 0; j < kBlocks; ++j) {
      dt[j] = load(w.dt + row + j * kLanes);
      dtu[j] = load(w.dtu + row + j * kLanes);
      dy[j] = load(w.dy + row + j * kLanes);
      decay_terms[j] = first ? Vec{} : load(sum_decay + j * kLanes);
      input_terms[j] = first ? Vec{} : load(sum_input + j * kLanes);
    }
    SSMTUNE_UNROLL
    for (int four = 0; four < 2; ++four) {
      Vec terms[4];
      SSMTUNE_UNROLL
      for (int k = 0; k < 4; ++k) {
        const int i = 4 * four + k;
        SSMTUNE_UNROLL
        for (int j = 0; j < kBlocks; ++j) {
          const Vec adjoint = dy[j] * C[t * C_stride + i] + carry[j][i];
          const Vec term = adjoint * dtu[j];
          terms[k] = j == 0 ? term : terms[k] + term;
          input_terms[j] += adjoint * B[t * B_stride + i];
          carry[j][i] = adjoint * load(decay + (j * kStates + i) * kLanes);
          const Vec q = carry[j][i] * load(previous + (j * kStates + i) * kLanes);
          decay_terms[j] += q * load(A + j * matrix_size + i * kLanes);
          if constexpr (kGradA) dA[j][i] += q * dt[j];
        }
      }
      dB[four] = sum_four(terms);
    }
    if (dB_sums) add_to_sums(dB_sums + t * dB_stride, dB[0], dB[1]);
    SSMTUNE_UNROLL
    for (int j = 0; j < kBlocks; ++j) {
      store(sum_decay + j * kLanes, decay_terms[j]);
      store(sum_input + j * kLanes, input_terms[j]);
    }
  }
  SSMTUNE_UNROLL
  for (int j = 0; j < kBlocks; ++j) {
    SSMTUNE_UNROLL
    for (int i = 0; i < kStates; ++i) {
      const int64_t at = j * matrix_size + (n + i) * kLanes;
      store(tile.carry + at, carry[j][i]);
      if constexpr (kGradA) store(tile.dA + at, dA[j][i]);
    }
  }
}

template <bool kOutput, bool kOffset, bool kGradA>
void scan(const Tile& tile, const Workspace& w) {
  for (int64_t n = 0; n < tile.padded_states; n += kStates) {
    recompute<kOutput, kOffset>(tile, w, n);
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
void accumulate_offset(const Tile& tile, const float* dy, float* doffset) {
  for (int64_t n = 0; n < tile.padded_states; n += kStates) {
    Vec sum[kStates];
    SSMTUNE_UNROLL
    for (int i = 0; i < kStates; ++i) sum[i] = load(doffset + (n + i) * kLanes);
    for (int64_t t = 0; t < tile.steps; ++t) {
      const Vec g = load(dy + t * kBlocks * kLanes);
      SSMTUNE_UNROLL
      for (int i = 0; i < kStates; ++i) sum[i] += g * tile.C[t][n + i];
    }
    SSMTUNE_UNROLL
    for (int i = 0; i < kStates; ++i) store(doffset + (n + i) * kLanes, sum[i]);
  }
}

// The rows of one block of channels.
struct BlockRows {
  TilePosition at;
  Rows<const float> u, delta, z, dout;
  Rows<float> du, ddelta, dz;
};

// What depends on the step and the channel alone: dt, dt u, the slope of softplus, dy, and dz without its factor, the output.
void prepare(const SelectiveScanBackward& p, const Workspace& w, int64_t block, int j, const BlockRows& rows) {
  const Vec smallest_decay = load(w.smallest_decay + block * kLanes), largest_decay = load(w.largest_decay + block * kLanes);
  const Vec bias = load(w.delta_bias + block * kLanes);
  const bool has_dout = p.dout.data != nullptr, has_z = p.z.data != nullptr;
  constexpr int64_t kNext = kBlocks * kLanes;
  for (int64_t t = 0; t < rows.at.steps; ++t) {
    const int64_t row = (t * kBlocks + j) * kLanes;
    if (rows.u.direct) __builtin_prefetch(rows.u[t] + kNext);
    if (rows.delta.direct) __builtin_prefetch(rows.delta[t] + kNext);
    if (rows.du.direct) __builtin_prefetch(rows.du[t], 1);
    if (rows.ddelta.direct) __builtin_prefetch(rows.ddelta[t], 1);
    Vec dt = load(rows.delta[t]) + bias, slope = broadcast(1.0f);
    if (p.delta_softplus) {
      const SoftplusSigmoid both = softplus_sigmoid(dt);
      dt = both.softplus;
      slope = both.sigmoid;
    }
    const Vec value = load(rows.u[t]);
    store(w.dt + row, exponent_step(dt, smallest_decay, largest_decay));
    store(w.dtu + row, dt * value);
    store(w.slope + row, slope);

    Vec dy{};
    if (has_dout) {
      if (rows.dout.direct) __builtin_prefetch(rows.dout[t] + kNext);
      dy = load(rows.dout[t]);
    }
    if (has_z) {
      if (rows.z.direct) __builtin_prefetch(rows.z[t] + kNext);
      const Vec gate = load(rows.z[t]), s = sigmoid(gate);
      store(rows.dz[t], dy * s * (1.0f + gate * (1.0f - s)));
      dy *= gate * s;
    }
    store(w.dy + row, dy);
  }
}

void finish(const Workspace& w, int64_t block, int j, const BlockRows& rows, bool has_dz) {
  const Vec D = load(w.D + block * kLanes), output_offset = load(w.output_offset + block * kLanes);
  Vec dD{}, ddelta_bias{}, doutput_offset{};
  for (int64_t t = 0; t < rows.at.steps; ++t) {
    const int64_t row = (t * kBlocks + j) * kLanes;
    const Vec value = load(rows.u[t]), dy = load(w.dy + row), sum_input = load(w.sum_input + row);
    const Vec ddelta = (value * sum_input + load(w.sum_decay + row) * kLn2) * load(w.slope + row);
    store(rows.du[t], load(w.dt + row) * sum_input + D * dy);
    store(rows.ddelta[t], ddelta);
    if (has_dz) store(rows.dz[t], load(rows.dz[t]) * (load(w.y + row) + D * value + output_offset));
    dD += dy * value;
    ddelta_bias += ddelta;
    doutput_offset += dy;
  }
  const auto add = [block](float* sums, Vec x) { store(sums + block * kLanes, load(sums + block * kLanes) + x); };
  add(w.dD, dD);
  add(w.ddelta_bias, ddelta_bias);
  add(w.doutput_offset, doutput_offset);
}

void read_state_in(const SelectiveScanBackward& p, const Workspace& w, const ChannelBlocks& blocks, int64_t block, int j,
                   int64_t batch, int64_t chunk) {
  float* const target = w.state_in + j * blocks.matrix_size();
  int64_t known = 0;
  if (chunk > 0) {
    known = p.dstate * kLanes;
    copy(target, chunk_state(p, batch, chunk - 1, blocks.channel(block)), known);
  } else if (w.first_state) {
    known = blocks.matrix_size();
    copy(target, w.first_state + block * blocks.matrix_size(), known);
  }
  fill_zero(target + known, blocks.matrix_size() - known);
}

void run_chunk(const SelectiveScanBackward& p, const Workspace& w, const ChannelBlocks& blocks, int64_t batch, int64_t chunk,
               float* dBC) {
  const int64_t time = chunk * kChunk;
  const int64_t steps = p.seqlen - time < kChunk ? p.seqlen - time : kChunk;
  const StateRows B = state_rows(p, p.B, batch, time, steps, w.B);
  const StateRows C = state_rows(p, p.C, batch, time, steps, w.C);
  if (dBC) {
    const int64_t sums = steps * p.padded_states() / kStates * kSumFloats;
    fill_zero(w.dB, sums);
    fill_zero(w.dC, sums);
  }
  const bool has_dz = p.dz.data != nullptr;
  const Scan scan = choose_scan(has_dz, w.offset, w.dA);
  for (int64_t first = 0; first < blocks.count(); first += kBlocks) {
    BlockRows rows[kBlocks];
    for (int j = 0; j < kBlocks; ++j) {
      const int64_t block = first + j;
      const int64_t lanes = blocks.lanes(block);
      const TilePosition at{batch, blocks.channel(block), lanes > 0 ? lanes : 0, time, steps};
      BlockRows& r = rows[j];
      r.at = at;
      r.u = input_rows(p.u, at, w.u[j]);
      r.delta = input_rows(p.delta, at, w.delta[j]);
      if (p.z.data) r.z = input_rows(p.z, at, w.z[j]);
      if (p.dout.data) r.dout = input_rows(p.dout, at, w.dout[j]);
      r.du = output_rows(p.du, at, w.du[j]);
      r.ddelta = output_rows(p.ddelta, at, w.ddelta[j]);
      r.dz = output_rows(p.dz, at, w.dz[j]);
      prepare(p, w, block, j, r);
      if (lanes > 0) {
        read_state_in(p, w, blocks, block, j, batch, chunk);
      } else {
        fill_zero(w.state_in + j * blocks.matrix_size(), blocks.matrix_size());
      }
    }
    const int64_t matrix = first * blocks.matrix_size();
    const Tile tile{steps, p.padded_states(), blocks.matrix_size(), w.A + matrix, w.offset ? w.offset + matrix : nullptr, B, C,
                    w.state_in, w.carry + matrix, w.dA ? w.dA + matrix : nullptr};
    scan(tile, w);
    for (int j = 0; j < kBlocks; ++j) {
      const int64_t block = first + j;
      finish(w, block, j, rows[j], has_dz);
      if (w.doffset) {
        accumulate_offset(tile, w.dy + j * kLanes, w.doffset + block * blocks.matrix_size());
      }
      finish_rows(p.du, rows[j].at, rows[j].du);
      finish_rows(p.ddelta, rows[j].at, rows[j].ddelta);
      finish_rows(p.dz, rows[j].at, rows[j].dz);
    }
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
  const ChannelBlocks blocks(p, p.partition.channel_begin(task), p.partition.channel_end(task));
  const int64_t vector_floats = round_up(blocks.count(), kBlocks) * kLanes;
  const int64_t matrix_floats = vector_floats / kLanes * blocks.matrix_size();
  const int64_t group = p.partition.group(task);
  // A last block that only fills up a tile has no channels: its parameters stay zero.
  for (float* matrix : {w.A, w.carry, w.first_state, w.offset, w.dA, w.dinitial_state, w.doffset}) {
    if (matrix) fill_zero(matrix, matrix_floats);
  }
  for (float* vector : {w.smallest_decay, w.largest_decay, w.D, w.delta_bias, w.output_offset, w.dD, w.ddelta_bias, w.doutput_offset}) {
    fill_zero(vector, vector_floats);
  }
  blocks.pack_decay(p.A, w.A, w.smallest_decay, w.largest_decay);
  blocks.pack_vector(p.D, w.D);
  blocks.pack_vector(p.delta_bias, w.delta_bias);

  const int64_t first_row = p.partition.batch_begin(task);
  for (int64_t batch = first_row; batch < p.partition.batch_end(task); ++batch) {
    const bool first = batch == first_row;
    if (w.offset && (first || p.state_offset.batch_stride)) {
      blocks.pack_matrix(p.state_offset.data + batch * p.state_offset.batch_stride, w.offset);
    }
    if (p.output_offset.data && (first || p.output_offset.batch_stride)) {
      blocks.pack_vector(p.output_offset.data + batch * p.output_offset.batch_stride, w.output_offset);
    }
    if (w.first_state && (first || p.initial_state.batch_stride)) {
      blocks.pack_matrix(p.initial_state.data + batch * p.initial_state.batch_stride, w.first_state);
    }
    if (p.dlast_state) {
      blocks.pack_matrix(p.dlast_state + batch * p.dim * p.dstate, w.carry);
    } else {
      fill_zero(w.carry, matrix_floats);
    }

    float* dBC = p.dBC;
    if (dBC) dBC += (batch * p.partition.ranges + p.partition.range(task)) * p.seqlen * 2 * p.padded_states();
    for (int64_t chunk = p.chunks() - 1; chunk >= 0; --chunk) run_chunk(p, w, blocks, batch, chunk, dBC);

    if (p.dinitial_state.data) {
      if (p.dinitial_state.batch_stride) {
        blocks.unpack_matrix(w.carry, p.dinitial_state.data + batch * p.dinitial_state.batch_stride);
      } else {
        add(w.dinitial_state, w.carry, matrix_floats);
      }
    }
    if (p.dstate_offset.batch_stride) {
      blocks.unpack_matrix(w.doffset, p.dstate_offset.data + batch * p.dstate_offset.batch_stride);
      fill_zero(w.doffset, matrix_floats);
    }
    if (p.doutput_offset.batch_stride) {
      blocks.unpack_vector(w.doutput_offset, p.doutput_offset.data + batch * p.doutput_offset.batch_stride);
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
