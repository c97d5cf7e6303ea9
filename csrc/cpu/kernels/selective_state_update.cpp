#include "cpu/dispatch.h"
#include "cpu/vec.h"

namespace ssmtune::SSMTUNE_CPU_CAPABILITY {

void selective_state_update(const SelectiveStateUpdate& p, int64_t row, int64_t begin, int64_t end);

namespace {

// Rows of state and A lie along the states, so lanes are states here; the sums of kLanes channels are added up together.
template <typename T, bool kOneDecay>
void update(const SelectiveStateUpdate& p, int64_t row, int64_t begin, int64_t end) {
  const T* const x = static_cast<const T*>(p.x) + row * p.dim;
  const T* const delta = static_cast<const T*>(p.dt) + row * p.dim;
  const T* const z = p.z ? static_cast<const T*>(p.z) + row * p.dim : nullptr;
  T* const out = static_cast<T*>(p.out) + row * p.dim;
  const T* const B = static_cast<const T*>(p.B) + row * p.groups * p.dstate;
  const T* const C = static_cast<const T*>(p.C) + row * p.groups * p.dstate;
  const int64_t group_size = p.dim / p.groups;
  float* const state = p.state + row * p.dim * p.dstate;
  const int64_t adapter = p.adapter_of_row ? p.adapter_of_row[row] : row;
  const float* const state_offset = adapter < 0 ? nullptr : p.state_offset.row(adapter);
  const float* const output_offset = adapter < 0 ? nullptr : p.output_offset.row(adapter);

  for (int64_t channel = begin; channel < end; channel += kLanes) {
    const int64_t lanes = end - channel < kLanes ? end - channel : kLanes;
    Vec dt = load_first(delta + channel, lanes);
    if (p.dt_bias) dt += load_first(p.dt_bias + channel, lanes);
    if (p.dt_softplus) dt = softplus(dt);
    const Vec value = load_first(x + channel, lanes);
    // of each channel, what multiplies A, or with one decay the decay itself
    float rate_of[kLanes], dtx_of[kLanes];
    Vec rate = dt * kLog2e;
    if constexpr (kOneDecay) rate = exp2(at_most(load_first(p.A + channel, lanes) * rate, 127.0f));
    store(rate_of, rate);
    store(dtx_of, dt * value);

    Vec sums[kLanes] = {};
    for (int64_t i = 0; i < lanes; ++i) {
      const int64_t first = (channel + i) * p.dstate;
      // one group is the usual case, and a division takes as long as a state
      const int64_t group = p.groups == 1 ? 0 : (channel + i) / group_size * p.dstate;
      for (int64_t n = 0; n < p.dstate; n += kLanes) {
        const int64_t states = p.dstate - n < kLanes ? p.dstate - n : kLanes;
        Vec h = load_first(state + first + n, states);
        if constexpr (kOneDecay) {
          h *= rate_of[i];
        } else {
          h *= exp2(at_most(load_first(p.A + first + n, states) * rate_of[i], 127.0f));
        }
        h += load_first(B + group + n, states) * dtx_of[i];
        store_first(state + first + n, h, states);
        if (state_offset) h += load_first(state_offset + first + n, states);
        sums[i] += h * load_first(C + group + n, states);
      }
    }
    Vec y = sum_each(sums);
    if (p.D) y += load_first(p.D + channel, lanes) * value;
    if (output_offset) y += load_first(output_offset + channel, lanes);
    if (z) y *= silu(load_first(z + channel, lanes));
    store_first(out + channel, y, lanes);
  }
}

}  // namespace

void selective_state_update(const SelectiveStateUpdate& p, int64_t row, int64_t begin, int64_t end) {
  const FlushSubnormals flush;
  const auto run = [&]<typename T>(T) {
    return p.one_decay ? update<T, true>(p, row, begin, end) : update<T, false>(p, row, begin, end);
  };
  switch (p.dtype) {
    case DType::kFloat32: return run(float{});
    case DType::kBFloat16: return run(BFloat16{});
    case DType::kFloat16: return run(Float16{});
  }
}

}  // namespace ssmtune::SSMTUNE_CPU_CAPABILITY
