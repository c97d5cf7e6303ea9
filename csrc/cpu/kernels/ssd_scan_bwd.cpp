#include "cpu/dispatch.h"
#include "cpu/ssd_scan.h"

namespace ssmtune::SSMTUNE_CPU_CAPABILITY {
namespace {

// The gradient of a parameter of each head: added up over rows where they share it, else written after each row.
struct HeadGradient {
  ChannelGradient target;
  int64_t rows, count;  // of one head: a matrix, whose rows are padded in `sums`
  float* sums;          // (heads, rows, padded(count)), null where it is not wanted

  HeadGradient(Arena& arena, const ChannelGradient& target, int64_t heads, int64_t rows, int64_t count)
      : target(target), rows(rows), count(count), sums(target.data ? arena.take(heads * rows * padded(count)) : nullptr) {}

  int64_t head_size() const { return rows * padded(count); }
  float* of(int64_t i) const { return sums ? sums + i * head_size() : nullptr; }
  void clear(int64_t heads) const {
    if (sums) fill_zero(sums, heads * head_size());
  }
  void write(float* data, int64_t first, int64_t heads) const {
    for (int64_t i = 0; i < heads; ++i) write_states(data + (first + i) * rows * count, rows, count, of(i));
  }
  void finish_row(int64_t r, int64_t first, int64_t heads) const {
    if (!sums || target.batch_stride == 0) return;
    write(target.data + r * target.batch_stride, first, heads);
    clear(heads);
  }
  void finish_task(int64_t group, int64_t first, int64_t heads) const {
    if (sums && target.batch_stride == 0) write(target.data + group * target.group_stride, first, heads);
  }
};

struct Workspace {
  Workspace(const SsdScanBackward& p, Arena& arena)
      : dA(arena, p.dA, p.max_range_heads(), 1, 1), dD(arena, p.dD, p.max_range_heads(), 1, p.headdim),
        ddt_bias(arena, p.ddt_bias, p.max_range_heads(), 1, 1),
        dinitial_states(arena, p.dinitial_states, p.max_range_heads(), p.headdim, p.dstate),
        dstate_offset(arena, p.dstate_offset, p.max_range_heads(), p.headdim, p.dstate),
        doutput_offset(arena, p.doutput_offset, p.max_range_heads(), 1, p.headdim) {
    const int64_t states = padded(p.dstate), channels = padded(p.headdim);
    carry = arena.take(p.max_range_heads() * p.headdim * states);
    for (float** matrix : {&state, &offset}) *matrix = arena.take(p.headdim * states);
    for (float** rows : {&B, &C, &B_columns, &dB, &dC, &read}) *rows = arena.take(kSsdChunk * states);
    for (float** rows : {&x, &x_columns, &g, &scaled, &dv, &dv_columns}) *rows = arena.take(kSsdChunk * channels);
    for (float** square : {&scores, &weights, &products, &pairs}) *square = arena.take(kSsdChunk * kSsdChunk);
  }

  // Those of each head, of gradients that rows may share.
  HeadGradient dA, dD, ddt_bias, dinitial_states, dstate_offset, doutput_offset;
  float *carry, *state, *offset, *B, *C, *B_columns, *dB, *dC, *read;
  float *x, *x_columns, *g, *scaled, *dv, *dv_columns, *scores, *weights, *products, *pairs;
};

// One head over one chunk.
struct Head {
  const SsdScanBackward& p;
  const Workspace& w;
  const Row& row;
  int64_t r, time, steps, head, place;  // place: among the heads of the task
  int64_t states = padded(p.dstate), channels = padded(p.headdim), columns = padded(steps);
  float* carry = w.carry + place * p.headdim * states;
  Decays decays{p, row, time, steps, head};
  // Gradients that reach each step's decay: of what was read of the states before the chunk, of what enters and reaches its
  // end, and of what goes from one step of it to another.
  alignas(64) float from_start[kSsdChunk] = {}, to_end[kSsdChunk] = {}, across[kSsdChunk] = {}, dsteps[kSsdChunk] = {};
  float through = 0.0f;

  bool wants_steps() const { return p.ddt || w.dA.sums || w.ddt_bias.sums; }

  void run() {
    read_rows(p.x, row, time, steps, head, p.headdim, w.x);
    if (p.dout.data) {
      read_rows(p.dout, row, time, steps, head, p.headdim, w.g);
    } else {
      fill_zero(w.g, columns * channels);
    }
    transpose(w.x, channels, columns, channels, w.x_columns, kSsdChunk);
    pair_steps();
    back_through_inputs();
    back_through_states();
    direct_gradients();
    if (wants_steps()) finish_steps();
  }

  // weights[t, s] = C_t B_s decay for s <= t, else 0; pairs += the same of g_t x_s dt_s in the place of C_t B_s
  void pair_steps() {
    gemm(steps, columns, p.headdim, {w.g, channels, 1}, w.x_columns, kSsdChunk, 0.0f, w.products, kSsdChunk);
    alignas(64) float open[kSsdChunk] = {};  // from each step to those that the loop below has passed
    for (int64_t t = steps - 1; t >= 0; --t) {
      Vec sum{};
      for (int64_t s = 0; s < columns; s += kLanes) {
        const int64_t at = t * kSsdChunk + s;
        const IntVec later = lane_numbers(s) > static_cast<float>(t);
        const Vec decay = s > t ? Vec{} : select(later, Vec{}, decays.to(t, s));
        const Vec weight = load(w.scores + at) * decay, product = load(w.products + at) * load(decays.dt + s);
        store(w.weights + at, weight);
        store(w.pairs + at, load(w.pairs + at) + decay * product);
        const Vec earlier = select(lane_numbers(s) < static_cast<float>(t), load(open + s) + weight * product, Vec{});
        store(open + s, earlier);
        sum += earlier;
      }
      for (int i = 0; i < kLanes; ++i) across[t] += sum[i];
    }
  }

  // dv, the gradient of dt x as (headdim, steps), and with it dx
  void back_through_inputs() {
    gemm(p.headdim, columns, p.dstate, {carry, states, 1}, w.B_columns, kSsdChunk, 0.0f, w.dv_columns, kSsdChunk);
    for (int64_t s = 0; s < columns; s += kLanes) {
      const Vec decay = load(decays.to_end + s);
      Vec sum{};
      for (int64_t i = 0; i < p.headdim; ++i) {
        float* const dv = w.dv_columns + i * kSsdChunk + s;
        const Vec value = decay * load(dv);
        store(dv, value);
        sum += value * load(w.x_columns + i * kSsdChunk + s);
      }
      store(to_end + s, sum * load(decays.dt + s));
    }
    gemm(p.headdim, columns, steps, {w.g, 1, channels}, w.weights, kSsdChunk, 1.0f, w.dv_columns, kSsdChunk);
    for (int64_t s = 0; s < columns; s += kLanes) {
      Vec sum{};
      for (int64_t i = 0; i < p.headdim; ++i) {
        sum += load(w.dv_columns + i * kSsdChunk + s) * load(w.x_columns + i * kSsdChunk + s);
      }
      store(dsteps + s, sum);
    }
    if (!p.dx.data) return;
    transpose(w.dv_columns, kSsdChunk, channels, columns, w.dv, channels);
    for (int64_t i = 0; i < channels; i += kLanes) {
      const Vec D = p.D ? load_first(p.D + head * p.headdim + i, lanes_left(i, p.headdim)) : Vec{};
      for (int64_t t = 0; t < steps; ++t) {
        const int64_t at = t * channels + i;
        store(w.dv + at, decays.dt[t] * load(w.dv + at) + D * load(w.g + at));
      }
    }
    write_rows(p.dx, row, time, steps, head, p.headdim, w.dv);
  }

  // What goes by way of the states before and after the chunk: parts of dB and dC, and the gradient of the states before
  void back_through_states() {
    float weight[kSsdChunk];
    if (p.dBC) {
      for (int64_t t = 0; t < steps; ++t) weight[t] = decays.dt[t] * decays.to_end[t];
      scale_rows(w.x, weight, steps, p.headdim, w.scaled);
      gemm(steps, states, p.headdim, {w.scaled, channels, 1}, carry, states, 1.0f, w.dB, states);
    }
    load_state();
    scale_rows(w.g, decays.from_start, steps, p.headdim, w.scaled);
    gemm(steps, states, p.headdim, {w.scaled, channels, 1}, w.state, states, 0.0f, w.read, states);
    for (int64_t t = 0; t < steps; ++t) {
      Vec sum{};
      for (int64_t n = 0; n < states; n += kLanes) {
        const Vec value = load(w.read + t * states + n);
        sum += value * load(w.C + t * states + n);
        store(w.dC + t * states + n, load(w.dC + t * states + n) + value);
      }
      for (int i = 0; i < kLanes; ++i) from_start[t] += sum[i];
    }
    if (p.state_offset.data && p.dBC) {
      read_states(p.state_offset.row(r) + head * p.headdim * p.dstate, p.headdim, p.dstate, w.offset);
      gemm(steps, states, p.headdim, {w.g, channels, 1}, w.offset, states, 1.0f, w.dC, states);
    }
    Vec sum{};
    for (int64_t i = 0; i < p.headdim * states; i += kLanes) sum += load(carry + i) * load(w.state + i);
    for (int i = 0; i < kLanes; ++i) through += decays.whole * sum[i];
    gemm(p.headdim, states, steps, {w.scaled, 1, channels}, w.C, states, decays.whole, carry, states);
  }

  void load_state() {
    if (time == row.begin) return first_states(p, r, head, w.state);
    const int64_t chunk = p.first_chunk(r) + (time - row.begin) / kSsdChunk - 1;
    read_states(p.chunk_states + (chunk * p.heads + head) * p.headdim * p.dstate, p.headdim, p.dstate, w.state);
  }

  void direct_gradients() {
    if (float* const sums = w.dstate_offset.of(place)) {
      gemm(p.headdim, states, steps, {w.g, 1, channels}, w.C, states, 1.0f, sums, states);
    }
    for (int64_t i = 0; i < channels; i += kLanes) {
      Vec D{}, offset{};
      for (int64_t t = 0; t < steps; ++t) {
        const Vec g = load(w.g + t * channels + i);
        D += g * load(w.x + t * channels + i);
        offset += g;
      }
      if (float* const sums = w.dD.of(place)) store(sums + i, load(sums + i) + D);
      if (float* const sums = w.doutput_offset.of(place)) store(sums + i, load(sums + i) + offset);
    }
  }

  // A decay is crossed by what is read at it or later of earlier inflows and of the states before the chunk, and by what
  // entered before it and reaches the end.
  void finish_steps() {
    float later[kSsdChunk], sum = 0.0f, earlier = 0.0f, dA = 0.0f, dbias = 0.0f;
    for (int64_t t = steps - 1; t >= 0; --t) later[t] = sum += from_start[t];
    alignas(64) float slope[kSsdChunk];
    for (int64_t t = 0; t < columns; t += kLanes) {
      const Vec raw = load(decays.raw + t), step = p.dt_softplus ? softplus(raw) : raw;
      const IntVec beyond = (step < p.dt_min) | (step > p.dt_max);
      store(slope + t, select(beyond, Vec{}, p.dt_softplus ? sigmoid(raw) : broadcast(1.0f)));
    }
    for (int64_t t = 0; t < steps; ++t) {
      const float ddecay = across[t] + later[t] + earlier + through;
      earlier += to_end[t];
      dA += decays.dt[t] * ddecay;
      const float ddt = (p.A[head] * ddecay + dsteps[t]) * slope[t];
      dbias += ddt;
      if (p.ddt) p.ddt[(row.batch * p.seqlen + time + t) * p.heads + head] = ddt;
    }
    if (float* const sums = w.dA.of(place)) sums[0] += dA;
    if (float* const sums = w.ddt_bias.of(place)) sums[0] += dbias;
  }
};

void run_chunk(const SsdScanBackward& p, const Workspace& w, int64_t task, int64_t r, const Row& row, int64_t time) {
  const int64_t steps = row.end - time < kSsdChunk ? row.end - time : kSsdChunk;
  const int64_t first = p.head_begin(task), heads = p.head_end(task) - first, group = p.partition.section(task);
  const int64_t states = padded(p.dstate), columns = padded(steps);
  read_rows(p.B, row, time, steps, group, p.dstate, w.B);
  read_rows(p.C, row, time, steps, group, p.dstate, w.C);
  transpose(w.B, states, columns, states, w.B_columns, kSsdChunk);
  gemm(steps, columns, p.dstate, {w.C, states, 1}, w.B_columns, kSsdChunk, 0.0f, w.scores, kSsdChunk);
  fill_zero(w.pairs, kSsdChunk * kSsdChunk);
  for (float* rows : {w.dB, w.dC}) fill_zero(rows, kSsdChunk * states);
  for (int64_t i = 0; i < heads; ++i) Head{p, w, row, r, time, steps, first + i, i}.run();
  if (!p.dBC) return;
  gemm(steps, states, steps, {w.pairs, kSsdChunk, 1}, w.B, states, 1.0f, w.dC, states);
  gemm(steps, states, steps, {w.pairs, 1, kSsdChunk}, w.C, states, 1.0f, w.dB, states);
  float* const shares =
      p.dBC + ((row.batch * p.partition.ranges + p.partition.range(task)) * p.seqlen + time) * 2 * p.dstate;
  write_rows(shares, 2 * p.dstate, steps, p.dstate, w.dB);
  write_rows(shares + p.dstate, 2 * p.dstate, steps, p.dstate, w.dC);
}

void run_row(const SsdScanBackward& p, const Workspace& w, int64_t task, int64_t r) {
  const Row row = p.row(r);
  const int64_t first = p.head_begin(task), heads = p.head_end(task) - first;
  const int64_t size = p.headdim * p.dstate, padded_size = p.headdim * padded(p.dstate);
  if (p.dfinal_states) {
    read_states(p.dfinal_states + (r * p.heads + first) * size, heads * p.headdim, p.dstate, w.carry);
  } else {
    fill_zero(w.carry, heads * padded_size);
  }
  const int64_t chunks = (row.end - row.begin + kSsdChunk - 1) / kSsdChunk;
  for (int64_t i = chunks - 1; i >= 0; --i) run_chunk(p, w, task, r, row, row.begin + i * kSsdChunk);
  if (float* const sums = w.dinitial_states.sums) {
    for (int64_t i = 0; i < heads * padded_size; i += kLanes) store(sums + i, load(sums + i) + load(w.carry + i));
  }
}

int64_t scratch_floats(const SsdScanBackward& p) {
  Arena arena(nullptr);
  Workspace(p, arena);
  return arena.used();
}

void run_task(const SsdScanBackward& p, int64_t task, float* scratch) {
  const FlushSubnormals flush;
  Arena arena(scratch);
  const Workspace w(p, arena);
  const HeadGradient* const gradients[] = {&w.dA, &w.dD, &w.ddt_bias, &w.dinitial_states, &w.dstate_offset, &w.doutput_offset};
  const int64_t first = p.head_begin(task), heads = p.head_end(task) - first;
  for (const HeadGradient* gradient : gradients) gradient->clear(heads);
  for (int64_t r = p.partition.batch_begin(task); r < p.partition.batch_end(task); ++r) {
    run_row(p, w, task, r);
    for (const HeadGradient* gradient : gradients) gradient->finish_row(r, first, heads);
  }
  for (const HeadGradient* gradient : gradients) gradient->finish_task(p.partition.group(task), first, heads);
}

}  // namespace

extern const Kernel<SsdScanBackward> ssd_scan_bwd;
const Kernel<SsdScanBackward> ssd_scan_bwd{scratch_floats, run_task};

}  // namespace ssmtune::SSMTUNE_CPU_CAPABILITY
