#include "cpu/dispatch.h"
#include "cpu/selective_scan.h"

namespace ssmtune::SSMTUNE_CPU_CAPABILITY {
namespace {

// States worked on together where there are as many.
inline constexpr int kWideGroup = 2 * kStateGroup;

struct Workspace {
  Workspace(const SelectiveScanForward& p, Arena& arena) {
    const int64_t channels = p.partition.max_range_channels();
    const int64_t matrix = channels * p.padded_states();
    A = arena.take(matrix);
    state = arena.take(matrix);
    first_state = p.initial_state.data ? arena.take(matrix) : nullptr;
    offset = p.state_offset.data ? arena.take(matrix) : nullptr;
    for (float** vector : {&smallest_decay, &largest_decay, &D, &delta_bias, &output_offset, &step_sum}) {
      *vector = arena.take(channels);
    }
    B = arena.take(state_rows_floats(p));
    C = arena.take(state_rows_floats(p));
    for (float** tile : {&u, &delta, &z, &out, &dt, &dtu, &y}) *tile = arena.take(kChunk * kLanes);
  }

  float *A, *state, *first_state, *offset, *smallest_decay, *largest_decay, *D, *delta_bias, *output_offset, *step_sum, *B, *C;
  float *u, *delta, *z, *out, *dt, *dtu, *y;
};

// One block of channels over one chunk.
struct Tile {
  int64_t steps;
  const float *A, *offset;
  StateRows B, C;
  const float *dt, *dtu;
  float *y, *state;
  Prefetch<4>* next;
};

// y += C (h + offset) while h = exp2(dt A) h + dtu B, for kStates states from n on.
template <int kStates, bool kOffset>
__attribute__((noinline)) void scan_states(const Tile& tile, int64_t n) {
  const float* const A = tile.A + n * kLanes;
  const float* const offset = kOffset ? tile.offset + n * kLanes : nullptr;
  float* const state = tile.state + n * kLanes;
  Vec h[kStates];
  SSMTUNE_UNROLL
  for (int i = 0; i < kStates; ++i) h[i] = load(state + i * kLanes);
  const bool first = n == 0;
  for (int64_t t = 0; t < tile.steps; ++t) {
    if (first) tile.next->step(t);
    const Vec dt = load(tile.dt + t * kLanes), dtu = load(tile.dtu + t * kLanes);
    const float* const B = tile.B[t] + n;
    const float* const C = tile.C[t] + n;
    Vec y[2] = {load(tile.y + t * kLanes), Vec{}};
    SSMTUNE_UNROLL
    for (int i = 0; i < kStates; ++i) {
      h[i] = exp2(dt * load(A + i * kLanes)) * h[i] + dtu * B[i];
      const Vec seen = kOffset ? h[i] + load(offset + i * kLanes) : h[i];
      y[i % 2] += seen * C[i];
    }
    store(tile.y + t * kLanes, y[0] + y[1]);
  }
  SSMTUNE_UNROLL
  for (int i = 0; i < kStates; ++i) store(state + i * kLanes, h[i]);
}

template <bool kOffset>
void scan(const Tile& tile, int64_t padded_states) {
  int64_t n = 0;
  for (; n + kWideGroup <= padded_states; n += kWideGroup) scan_states<kWideGroup, kOffset>(tile, n);
  if (n < padded_states) scan_states<kStateGroup, kOffset>(tile, n);
}

template <typename T>
void prepare(const SelectiveScanForward& p, const Workspace& w, const ChannelBlocks& blocks, int64_t block,
             const Rows<const T>& u, const Rows<const T>& delta, int64_t steps) {
  const Vec smallest_decay = load(w.smallest_decay + block * kLanes), largest_decay = load(w.largest_decay + block * kLanes);
  const Vec bias = load(w.delta_bias + block * kLanes), D = load(w.D + block * kLanes);
  const Vec output_offset = load(w.output_offset + block * kLanes);
  const bool may_grow = blocks.may_grow(p, w.largest_decay, block);
  Vec step_sum = load(w.step_sum + block * kLanes);
  for (int64_t t = 0; t < steps; ++t) {
    Vec dt = load(delta[t]) + bias;
    if (p.delta_softplus) dt = softplus(dt);
    const Vec value = load(u[t]);
    store(w.dtu + t * kLanes, dt * value);
    store(w.y + t * kLanes, D * value + output_offset);
    if (may_grow) dt = bounded_step(dt, smallest_decay, largest_decay);
    store(w.dt + t * kLanes, dt);
    step_sum += dt;
  }
  store(w.step_sum + block * kLanes, step_sum);
}

template <typename T>
void finish(const Workspace& w, const Rows<const T>& z, const Rows<T>& out, int64_t steps) {
  for (int64_t t = 0; t < steps; ++t) {
    Vec y = load(w.y + t * kLanes);
    if (z.data) {
      const Vec gate = load(z[t]);
      y *= gate * sigmoid(gate);
    }
    store(out[t], y);
  }
}

// The rows of one block of channels over one chunk, worked on as T.
template <typename T>
void run_block(const SelectiveScanForward& p, const Workspace& w, const ChannelBlocks& blocks, int64_t i,
               const TilePosition& at, const StateRows& B, const StateRows& C, Prefetch<4>& next) {
  const Rows<T> out = output_rows<T>(p.out, at, w.out);
  prepare<T>(p, w, blocks, i, input_rows<T>(p.u, at, w.u), input_rows<T>(p.delta, at, w.delta), at.steps);
  const int64_t matrix = i * blocks.matrix_size();
  const float* const offset = w.offset ? w.offset + matrix : nullptr;
  const Tile tile{at.steps, w.A + matrix, offset, B, C, w.dt, w.dtu, w.y, w.state + matrix, &next};
  if (w.offset) {
    scan<true>(tile, p.padded_states());
  } else {
    scan<false>(tile, p.padded_states());
  }
  finish<T>(w, input_rows<T>(p.z, at, w.z), out, at.steps);
  finish_rows(p.out, at, out);
}

// One chunk of a row from the step `time` on; the state after it is kept as that of `chunk` if another one of the sequence
// follows.
void run_chunk(const SelectiveScanForward& p, const Workspace& w, const ChannelBlocks& blocks, const Row& row, int64_t time,
               int64_t chunk) {
  const int64_t steps = row.end - time < kChunk ? row.end - time : kChunk;
  const bool kept = p.chunk_states && !(time + steps == row.end && p.ends_sequence(row));
  const StateRows B = state_rows(p, p.B, blocks.section(), row.batch, time, steps, w.B);
  const StateRows C = state_rows(p, p.C, blocks.section(), row.batch, time, steps, w.C);
  for (int64_t i = 0; i < blocks.count(); ++i) {
    const TilePosition at{row.batch, blocks.channel(i), blocks.lanes(i), time, steps};
    float* const kept_state = kept ? blocks.chunk_state(p, chunk, i) : nullptr;
    Prefetch<4> next({&p.u, &p.delta, &p.z, &p.out}, blocks.next_tile(row, at, i + 1, kChunk), kept_state);
    switch (rows_dtype({&p.u, &p.delta, &p.z, &p.out}, at)) {
      case DType::kFloat32: run_block<float>(p, w, blocks, i, at, B, C, next); break;
      case DType::kBFloat16: run_block<BFloat16>(p, w, blocks, i, at, B, C, next); break;
      case DType::kFloat16: run_block<Float16>(p, w, blocks, i, at, B, C, next); break;
    }
    if (kept) copy(kept_state, w.state + i * blocks.matrix_size(), p.dstate * kLanes);
  }
  if (kept) blocks.clear_padding(p, chunk);
}

void run(const SelectiveScanForward& p, int64_t task, float* scratch) {
  const FlushSubnormals flush;
  Arena arena(scratch);
  const Workspace w(p, arena);
  const ChannelBlocks blocks(p, task);
  const int64_t matrix_floats = blocks.count() * blocks.matrix_size();
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
    if (w.first_state) {
      if (first || p.initial_state.batch_stride) {
        blocks.pack_matrix(p.initial_state.data + r * p.initial_state.batch_stride, w.first_state);
      }
      copy(w.state, w.first_state, matrix_floats);
    } else {
      fill_zero(w.state, matrix_floats);
    }
    fill_zero(w.step_sum, blocks.count() * kLanes);
    const Row row = p.row(r);
    const int64_t chunk = p.first_chunk(r), chunks = (row.end - row.begin - 1) / kChunk + 1;
    for (int64_t i = 0; i < chunks; ++i) run_chunk(p, w, blocks, row, row.begin + i * kChunk, chunk + i);
    const int64_t unused = chunk + chunks - 1;
    if (p.chunk_states && p.bounds && unused < p.first_chunk(r + 1)) blocks.clear_chunk(p, unused);
    blocks.unpack_matrix(w.state, p.last_state + r * p.dim * p.dstate);
    if (p.step_sums) blocks.unpack_vector(w.step_sum, p.step_sums + r * p.dim);
  }
}

int64_t scratch_floats(const SelectiveScanForward& p) {
  Arena arena(nullptr);
  Workspace(p, arena);
  return arena.used();
}

}  // namespace

extern const Kernel<SelectiveScanForward> selective_scan_fwd;
const Kernel<SelectiveScanForward> selective_scan_fwd{scratch_floats, run};

}  // namespace ssmtune::SSMTUNE_CPU_CAPABILITY
