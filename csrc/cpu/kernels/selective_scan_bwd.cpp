#include "cpu/dispatch.h"
#include "cpu/selective_scan.h"

namespace ssmtune::SSMTUNE_CPU_CAPABILITY {
namespace {

// Blocks of channels worked on together: the lanes of dB and dC are added up once for all of them.
inline constexpr int kBlocks = kLanes == 16 ? 2 : 1;
inline constexpr int kStates = kStateGroup;
static_assert(Partition::kUnit % (kBlocks * kLanes) == 0);

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
    for (float** vector : {&D, &delta_bias, &output_offset, &dD, &ddelta_bias, &doutput_offset}) {
      *vector = arena.take(channels);
    }
    B = arena.take(state_rows_floats(p));
    C = arena.take(state_rows_floats(p));
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
  float *D, *delta_bias, *output_offset, *dD, *ddelta_bias, *doutput_offset;
  float *B, *C;
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
  int64_t steps, matrix_size;
  const float *A, *offset;
  StateRows B, C;
  const float* state_in;
  float *carry, *dA;
  float* dBC;
  int64_t dBC_stride;
};

// h and a of every step of a group of states, and y += C (h + offset).
template <bool kOutput, bool kOffset>
__attribute__((noinline)) void recompute(const Tile& tile, const Workspace& w, int64_t n) {
  constexpr int64_t kStep = kBlocks * kStates * kLanes;
  Vec h[kBlocks][kStates];
  SSMTUNE_UNROLL
  for (int j = 0; j < kBlocks; ++j) {
    SSMTUNE_UNROLL
    for (int i = 0; i < kStates; ++i) {
      h[j][i] = load(tile.state_in + j * tile.matrix_size + (n + i) * kLanes);
      store(w.state + (j * kStates + i) * kLanes, h[j][i]);
    }
  }
  for (int64_t t = 0; t < tile.steps; ++t) {
    const float* const B = tile.B[t] + n;
    const float* const C = tile.C[t] + n;
    SSMTUNE_UNROLL
    for (int j = 0; j < kBlocks; ++j) {
      const int64_t row = (t * kBlocks + j) * kLanes;
      const Vec dt = load(w.dt + row), dtu = load(w.dtu + row);
      const float* const A = tile.A + j * tile.matrix_size + n * kLanes;
      const float* const offset = kOffset ? tile.offset + j * tile.matrix_size + n * kLanes : nullptr;
      float* const decay = w.decay + t * kStep + j * kStates * kLanes;
      float* const state = w.state + (t + 1) * kStep + j * kStates * kLanes;
      Vec y[2] = {};
      SSMTUNE_UNROLL
      for (int i = 0; i < kStates; ++i) {
        const Vec a = exp2(dt * load(A + i * kLanes));
        h[j][i] = a * h[j][i] + dtu * B[i];
        store(decay + i * kLanes, a);
        store(state + i * kLanes, h[j][i]);
        if constexpr (kOutput) {
          const Vec seen = kOffset ? h[j][i] + load(offset + i * kLanes) : h[j][i];
          y[i % 2] += seen * C[i];
        }
      }
      if constexpr (kOutput) store(w.y + row, load(w.y + row) + (y[0] + y[1]));
    }
  }
}

// The adjoint recurrence, last step first.
template <bool kOffset, bool kGradA>
__attribute__((noinline)) void reverse(const Tile& tile, const Workspace& w, int64_t n) {
  constexpr int64_t kStep = kBlocks * kStates * kLanes;
  Vec carry[kBlocks][kStates];
  SSMTUNE_UNROLL
  for (int j = 0; j < kBlocks; ++j) {
    SSMTUNE_UNROLL
    for (int i = 0; i < kStates; ++i) carry[j][i] = load(tile.carry + j * tile.matrix_size + (n + i) * kLanes);
  }
  for (int64_t t = tile.steps - 1; t >= 0; --t) {
    const float* const B = tile.B[t] + n;
    const float* const C = tile.C[t] + n;
    Vec dBC[2 * kStates];
    SSMTUNE_UNROLL
    for (int j = 0; j < kBlocks; ++j) {
      const int64_t row = (t * kBlocks + j) * kLanes, block = j * tile.matrix_size + n * kLanes;
      const Vec dt = load(w.dt + row), dtu = load(w.dtu + row), dy = load(w.dy + row);
      const float* const decay = w.decay + t * kStep + j * kStates * kLanes;
      const float* const previous = w.state + t * kStep + j * kStates * kLanes;
      Vec sum_decay{}, sum_input{};
      SSMTUNE_UNROLL
      for (int i = 0; i < kStates; ++i) {
        const Vec adjoint = dy * C[i] + carry[j][i];
        Vec seen = load(previous + kStep + i * kLanes);
        if constexpr (kOffset) seen += load(tile.offset + block + i * kLanes);
        dBC[i] = j == 0 ? adjoint * dtu : dBC[i] + adjoint * dtu;
        dBC[kStates + i] = j == 0 ? dy * seen : dBC[kStates + i] + dy * seen;
        sum_input += adjoint * B[i];
        carry[j][i] = adjoint * load(decay + i * kLanes);
        const Vec q = carry[j][i] * load(previous + i * kLanes);
        sum_decay += q * load(tile.A + block + i * kLanes);
        if constexpr (kGradA) {
          float* const dA = tile.dA + block + i * kLanes;
          store(dA, load(dA) + q * dt);
        }
      }
      store(w.sum_decay + row, load(w.sum_decay + row) + sum_decay);
      store(w.sum_input + row, load(w.sum_input + row) + sum_input);
    }
    if (tile.dBC) {
      float* const target = tile.dBC + t * tile.dBC_stride + 2 * n;
      SSMTUNE_UNROLL
      for (int i = 0; i < 2 * kStates; i += kLanes) {
        Vec part[kLanes];
        SSMTUNE_UNROLL
        for (int k = 0; k < kLanes; ++k) part[k] = dBC[i + k];
        store(target + i, load(target + i) + sum_each(part));
      }
    }
  }
  SSMTUNE_UNROLL
  for (int j = 0; j < kBlocks; ++j) {
    SSMTUNE_UNROLL
    for (int i = 0; i < kStates; ++i) store(tile.carry + j * tile.matrix_size + (n + i) * kLanes, carry[j][i]);
  }
}

void scan(const SelectiveScanBackward& p, const Tile& tile, const Workspace& w) {
  const bool output = p.dz.data != nullptr, offset = tile.offset != nullptr;
  for (int64_t n = 0; n < p.padded_states(); n += kStates) {
    if (output && offset) {
      recompute<true, true>(tile, w, n);
    } else if (output) {
      recompute<true, false>(tile, w, n);
    } else {
      recompute<false, false>(tile, w, n);
    }
    if (tile.dA) {
      offset ? reverse<true, true>(tile, w, n) : reverse<false, true>(tile, w, n);
    } else {
      offset ? reverse<true, false>(tile, w, n) : reverse<false, false>(tile, w, n);
    }
  }
}

// The gradient of a state offset over a tile, sum_t dy_t C_t[n]: a matrix product.
void accumulate_offset(const Tile& tile, const float* dy, int64_t padded_states, float* doffset) {
  for (int64_t n = 0; n < padded_states; n += kStates) {
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

// What depends on the step and the channel alone: dt, dt u, the slope of softplus, dy, and dz without its factor y.
void prepare(const SelectiveScanBackward& p, const Workspace& w, int64_t block, int j, const BlockRows& rows) {
  const Vec bias = load(w.delta_bias + block * kLanes), D = load(w.D + block * kLanes);
  const Vec output_offset = load(w.output_offset + block * kLanes);
  const bool has_dout = p.dout.data != nullptr, has_z = p.z.data != nullptr;
  constexpr int64_t kNext = kBlocks * kLanes;
  for (int64_t t = 0; t < rows.at.steps; ++t) {
    const int64_t row = (t * kBlocks + j) * kLanes;
    if (rows.u.direct) __builtin_prefetch(rows.u[t] + kNext);
    if (rows.delta.direct) __builtin_prefetch(rows.delta[t] + kNext);
    Vec dt = load(rows.delta[t]) + bias, slope = broadcast(1.0f);
    if (p.delta_softplus) {
      const SoftplusSigmoid both = softplus_sigmoid(dt);
      dt = both.softplus;
      slope = both.sigmoid;
    }
    const Vec value = load(rows.u[t]);
    store(w.dt + row, at_most(dt, kBound));
    store(w.dtu + row, dt * value);
    store(w.slope + row, slope);
    store(w.y + row, D * value + output_offset);
    store(w.sum_decay + row, Vec{});
    store(w.sum_input + row, Vec{});

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
  const Vec D = load(w.D + block * kLanes);
  Vec dD{}, ddelta_bias{}, doutput_offset{};
  for (int64_t t = 0; t < rows.at.steps; ++t) {
    const int64_t row = (t * kBlocks + j) * kLanes;
    const Vec value = load(rows.u[t]), dy = load(w.dy + row), sum_input = load(w.sum_input + row);
    const Vec ddelta = (value * sum_input + load(w.sum_decay + row) * kLn2) * load(w.slope + row);
    store(rows.du[t], load(w.dt + row) * sum_input + D * dy);
    store(rows.ddelta[t], ddelta);
    if (has_dz) store(rows.dz[t], load(rows.dz[t]) * load(w.y + row));
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
  const int64_t dBC_stride = 2 * p.padded_states();
  if (dBC) {
    dBC += time * dBC_stride;
    fill_zero(dBC, steps * dBC_stride);
  }
  const bool has_dz = p.dz.data != nullptr;
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
    const Tile tile{steps, blocks.matrix_size(), w.A + matrix, w.offset ? w.offset + matrix : nullptr, B, C, w.state_in,
                    w.carry + matrix, w.dA ? w.dA + matrix : nullptr, dBC, dBC_stride};
    scan(p, tile, w);
    for (int j = 0; j < kBlocks; ++j) {
      const int64_t block = first + j;
      finish(w, block, j, rows[j], has_dz);
      if (w.doffset) {
        accumulate_offset(tile, w.dy + j * kLanes, p.padded_states(), w.doffset + block * blocks.matrix_size());
      }
      finish_rows(p.du, rows[j].at, rows[j].du);
      finish_rows(p.ddelta, rows[j].at, rows[j].ddelta);
      finish_rows(p.dz, rows[j].at, rows[j].dz);
    }
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
  for (float* vector : {w.D, w.delta_bias, w.output_offset, w.dD, w.ddelta_bias, w.doutput_offset}) {
    fill_zero(vector, vector_floats);
  }
  blocks.pack_decay(p.A, w.A);
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
