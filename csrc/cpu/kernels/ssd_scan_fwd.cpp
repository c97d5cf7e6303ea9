#include "cpu/dispatch.h"
#include "cpu/ssd_scan.h"

namespace ssmtune::SSMTUNE_CPU_CAPABILITY {
namespace {

struct Workspace {
  Workspace(const SsdScanForward& p, Arena& arena) {
    const int64_t states = padded(p.dstate), channels = padded(p.headdim);
    state = arena.take(p.max_range_heads() * p.headdim * states);
    for (float** rows : {&B, &C, &C_columns}) *rows = arena.take(kSsdChunk * states);
    for (float** rows : {&x, &inflow, &y, &y_columns}) *rows = arena.take(kSsdChunk * channels);
    for (float** square : {&scores, &weights}) *square = arena.take(kSsdChunk * kSsdChunk);
  }

  float *state, *B, *C, *C_columns, *x, *inflow, *y, *y_columns, *scores, *weights;
};

// weights[s, t] = B_s C_t exp(A (dt_{s+1} + ... + dt_t)) dt_s for s <= t, else 0
void weigh(const Decays& decays, const float* scores, int64_t steps, float* weights) {
  for (int64_t s = 0; s < steps; ++s) {
    for (int64_t t = 0; t < padded(steps); t += kLanes) {
      const int64_t at = s * kSsdChunk + t;
      const Vec value = load(scores + at) * decays.from(s, t) * decays.dt[s];
      store(weights + at, t + kLanes <= s ? Vec{} : select(lane_numbers(t) < static_cast<float>(s), Vec{}, value));
    }
  }
}

// One head over one chunk.
void run_head(const SsdScanForward& p, const Workspace& w, int64_t r, const Row& row, int64_t time, int64_t steps, int64_t head,
              float* state) {
  const int64_t states = padded(p.dstate), channels = padded(p.headdim), columns = padded(steps);
  const Decays decays(p, row, time, steps, head);
  read_rows(p.x, row, time, steps, head, p.headdim, w.x);

  // y as (headdim, steps): what is read of the states before the chunk, of the offset, and of the steps of the chunk
  gemm(p.headdim, columns, p.dstate, {state, states, 1}, w.C_columns, kSsdChunk, 0.0f, w.y_columns, kSsdChunk);
  for (int64_t i = 0; i < p.headdim; ++i) {
    for (int64_t t = 0; t < columns; t += kLanes) {
      float* const y = w.y_columns + i * kSsdChunk + t;
      store(y, load(y) * load(decays.from_start + t));
    }
  }
  if (p.state_offset.data) {
    const float* const offset = p.state_offset.row(r) + head * p.headdim * p.dstate;
    gemm(p.headdim, columns, p.dstate, {offset, p.dstate, 1}, w.C_columns, kSsdChunk, 1.0f, w.y_columns, kSsdChunk);
  }
  weigh(decays, w.scores, steps, w.weights);
  gemm(p.headdim, columns, steps, {w.x, 1, channels}, w.weights, kSsdChunk, 1.0f, w.y_columns, kSsdChunk);

  transpose(w.y_columns, kSsdChunk, channels, columns, w.y, channels);
  const float* const D = p.D ? p.D + head * p.headdim : nullptr;
  const float* const output_offset = p.output_offset.data ? p.output_offset.row(r) + head * p.headdim : nullptr;
  for (int64_t i = 0; i < channels; i += kLanes) {
    const int64_t lanes = lanes_left(i, p.headdim);
    const Vec direct = D ? load_first(D + i, lanes) : Vec{}, added = output_offset ? load_first(output_offset + i, lanes) : Vec{};
    for (int64_t t = 0; t < steps; ++t) {
      const int64_t at = t * channels + i;
      store(w.y + at, load(w.y + at) + direct * load(w.x + at) + added);
    }
  }
  write_rows(p.out, row, time, steps, head, p.headdim, w.y);

  float weight[kSsdChunk];
  for (int64_t t = 0; t < steps; ++t) weight[t] = decays.dt[t] * decays.to_end[t];
  scale_rows(w.x, weight, steps, p.headdim, w.inflow);
  gemm(p.headdim, states, steps, {w.inflow, 1, channels}, w.B, states, decays.whole, state, states);
}

void run_row(const SsdScanForward& p, const Workspace& w, int64_t task, int64_t r) {
  const Row row = p.row(r);
  const int64_t first = p.head_begin(task), heads = p.head_end(task) - first, group = p.partition.section(task);
  const int64_t size = p.headdim * p.dstate, states = padded(p.dstate), padded_size = p.headdim * states;
  for (int64_t i = 0; i < heads; ++i) first_states(p, r, first + i, w.state + i * padded_size);
  for (int64_t time = row.begin; time < row.end; time += kSsdChunk) {
    const int64_t steps = row.end - time < kSsdChunk ? row.end - time : kSsdChunk;
    read_rows(p.B, row, time, steps, group, p.dstate, w.B);
    read_rows(p.C, row, time, steps, group, p.dstate, w.C);
    transpose(w.C, states, padded(steps), states, w.C_columns, kSsdChunk);
    gemm(steps, padded(steps), p.dstate, {w.B, states, 1}, w.C_columns, kSsdChunk, 0.0f, w.scores, kSsdChunk);
    for (int64_t i = 0; i < heads; ++i) {
      float* const state = w.state + i * padded_size;
      if (p.chunk_states && time > row.begin) {
        const int64_t chunk = p.first_chunk(r) + (time - row.begin) / kSsdChunk - 1;
        write_states(p.chunk_states + (chunk * p.heads + first + i) * size, p.headdim, p.dstate, state);
      }
      run_head(p, w, r, row, time, steps, first + i, state);
    }
  }
  const int64_t unused = p.first_chunk(r) + (row.end - row.begin - 1) / kSsdChunk;
  if (p.chunk_states && p.bounds && unused < p.first_chunk(r + 1)) {
    fill_zero(p.chunk_states + (unused * p.heads + first) * size, heads * size);
  }
  for (int64_t i = 0; i < heads; ++i) {
    write_states(p.final_states + (r * p.heads + first + i) * size, p.headdim, p.dstate, w.state + i * padded_size);
  }
}

int64_t scratch_floats(const SsdScanForward& p) {
  Arena arena(nullptr);
  Workspace(p, arena);
  return arena.used();
}

void run_task(const SsdScanForward& p, int64_t task, float* scratch) {
  const FlushSubnormals flush;
  Arena arena(scratch);
  const Workspace w(p, arena);
  for (int64_t r = p.partition.batch_begin(task); r < p.partition.batch_end(task); ++r) run_row(p, w, task, r);
}

}  // namespace

extern const Kernel<SsdScanForward> ssd_scan_fwd;
const Kernel<SsdScanForward> ssd_scan_fwd{scratch_floats, run_task};

}  // namespace ssmtune::SSMTUNE_CPU_CAPABILITY
