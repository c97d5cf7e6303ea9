// What the forward and the backward pass of Mamba-2's scan share: rows of tensors as floats, and the decays of a chunk.
#pragma once

#include "cpu/gemm.h"
#include "cpu/ssd_params.h"
#include "cpu/tile.h"

namespace ssmtune::SSMTUNE_CPU_CAPABILITY {

inline int64_t padded(int64_t count) { return round_up(count, kLanes); }

template <typename T>
SSMTUNE_INLINE void read_rows(const T* source, int64_t stride, int64_t steps, int64_t count, float* rows) {
  for (int64_t t = 0; t < steps; ++t) {
    for (int64_t i = 0; i < count; i += kLanes) {
      store(rows + t * padded(count) + i, load_first(source + t * stride + i, lanes_left(i, count)));
    }
  }
}

// Some steps of one head or group as rows of padded(size) floats, followed by rows of zeros up to padded(steps).
inline void read_rows(const HeadTensor& x, const Row& row, int64_t time, int64_t steps, int64_t head, int64_t size, float* rows) {
  const int64_t first = row.batch * x.batch_stride + time * x.stride + head * size;
  switch (x.dtype) {
    case DType::kFloat32: read_rows(static_cast<const float*>(x.data) + first, x.stride, steps, size, rows); break;
    case DType::kBFloat16: read_rows(static_cast<const BFloat16*>(x.data) + first, x.stride, steps, size, rows); break;
    case DType::kFloat16: read_rows(static_cast<const Float16*>(x.data) + first, x.stride, steps, size, rows); break;
  }
  fill_zero(rows + steps * padded(size), (padded(steps) - steps) * padded(size));
}

template <typename T>
SSMTUNE_INLINE void write_rows(T* target, int64_t stride, int64_t steps, int64_t count, const float* rows) {
  for (int64_t t = 0; t < steps; ++t) {
    for (int64_t i = 0; i < count; i += kLanes) {
      store_first(target + t * stride + i, load(rows + t * padded(count) + i), lanes_left(i, count));
    }
  }
}
inline void write_rows(const HeadTensor& x, const Row& row, int64_t time, int64_t steps, int64_t head, int64_t size,
                       const float* rows) {
  const int64_t first = row.batch * x.batch_stride + time * x.stride + head * size;
  switch (x.dtype) {
    case DType::kFloat32: return write_rows(static_cast<float*>(x.data) + first, x.stride, steps, size, rows);
    case DType::kBFloat16: return write_rows(static_cast<BFloat16*>(x.data) + first, x.stride, steps, size, rows);
    case DType::kFloat16: return write_rows(static_cast<Float16*>(x.data) + first, x.stride, steps, size, rows);
  }
}

// Rows of a (rows, count) parameter, padded with zeros to vectors, and back.
inline void read_states(const float* source, int64_t rows, int64_t count, float* target) {
  read_rows(source, count, rows, count, target);
}
inline void write_states(float* target, int64_t rows, int64_t count, const float* source) {
  write_rows(target, count, rows, count, source);
}
// The states of one head before a row of steps.
inline void first_states(const SsdScanParams& p, int64_t r, int64_t head, float* states) {
  const int64_t size = p.headdim * p.dstate;
  if (!p.initial_states.data) return fill_zero(states, p.headdim * padded(p.dstate));
  read_states(p.initial_states.row(r) + head * size, p.headdim, p.dstate, states);
}

// The time steps of one head over one chunk, and what decays between two of them: exp(A (dt_{s+1} + ... + dt_t)).
//
// Sums from the start of the chunk are kept as a float and what it leaves of a double: after a step that forgets all, the
// difference of two sums of floats would be wrong by as much as whole steps.
struct Decays {
  alignas(64) float raw[kSsdChunk], dt[kSsdChunk], high[kSsdChunk], low[kSsdChunk];
  alignas(64) float from_start[kSsdChunk];  // what is left at step t of the states before the chunk
  alignas(64) float to_end[kSsdChunk];      // what is left after the chunk of what enters at step t
  float whole;

  Decays(const SsdScanParams& p, const Row& row, int64_t time, int64_t steps, int64_t head) {
    const float* const source = p.dt + (row.batch * p.seqlen + time) * p.heads + head;
    const float bias = p.dt_bias ? p.dt_bias[head] : 0.0f;
    const int64_t lanes = padded(steps);
    for (int64_t t = 0; t < lanes; ++t) raw[t] = t < steps ? source[t * p.heads] + bias : 0.0f;
    for (int64_t t = 0; t < lanes; t += kLanes) {
      const Vec value = load(raw + t);
      store(dt + t, at_most(at_least(p.dt_softplus ? softplus(value) : value, p.dt_min), p.dt_max));
    }
    double sum = 0.0;
    for (int64_t t = 0; t < lanes; ++t) {
      if (t >= steps) dt[t] = 0.0f;
      sum += static_cast<double>(dt[t]) * (p.A[head] * kLog2e);
      high[t] = static_cast<float>(sum);
      low[t] = static_cast<float>(sum - high[t]);
    }
    const float end_high = high[steps - 1], end_low = low[steps - 1];
    for (int64_t t = 0; t < lanes; t += kLanes) {
      store(from_start + t, power(load(high + t)));
      store(to_end + t, power((end_high - load(high + t)) + (end_low - load(low + t))));
    }
    whole = from_start[steps - 1];
  }

  // From step s to the steps t, ..., t + kLanes - 1.
  SSMTUNE_INLINE Vec from(int64_t s, int64_t t) const { return power((load(high + t) - high[s]) + (load(low + t) - low[s])); }
  // From the steps s, ..., s + kLanes - 1 to step t.
  SSMTUNE_INLINE Vec to(int64_t t, int64_t s) const { return power((high[t] - load(high + s)) + (low[t] - load(low + s))); }

  // 2^x; NaN where that is too large for a float.
  static SSMTUNE_INLINE Vec power(Vec x) {
    return select(x > 127.0f, broadcast(__builtin_nanf("")), exp2(at_most(x, 127.0f)));
  }
};

SSMTUNE_INLINE Vec lane_numbers(int64_t first) {
  Vec x;
  for (int i = 0; i < kLanes; ++i) x[i] = static_cast<float>(first + i);
  return x;
}

// rows[t] = scale[t] * source[t], rows of padded(count) floats
inline void scale_rows(const float* source, const float* scale, int64_t steps, int64_t count, float* rows) {
  const int64_t stride = padded(count);
  for (int64_t t = 0; t < steps; ++t) {
    for (int64_t i = 0; i < stride; i += kLanes) store(rows + t * stride + i, load(source + t * stride + i) * scale[t]);
  }
}

}  // namespace ssmtune::SSMTUNE_CPU_CAPABILITY
