#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>
#include <vector>

#include "gradient.h"
#include "tasks.h"

namespace ssmtune {
namespace {

// Sums over ranges of channels are kept until the end; they may take about a third of the memory of u.
int64_t max_scan_ranges(int64_t dim, int64_t dstate) { return std::max<int64_t>(4, dim / (6 * dstate)); }

// How many segments a sequence is cut into, to be scanned at once in two passes. That repeats most of the work and pays only
// from three threads on: so one, unless there are too few channels for more than two threads. It depends on sizes alone, as
// all results do.
int64_t count_segments(int64_t batch, int64_t dim, int64_t seqlen) {
  constexpr int64_t kMaxTasks = 2, kSegments = 16, kMinSteps = 512;
  const int64_t tasks = batch * ((dim + Partition::kUnit - 1) / Partition::kUnit);
  return tasks > kMaxTasks ? 1 : std::clamp<int64_t>(seqlen / kMinSteps, 1, kSegments / tasks);
}

// What the parameters of one call point to besides tensors.
struct PackedSequences {
  std::vector<int64_t> bounds, group_begin;
};

void fill_scan(SelectiveScanParams& p, PackedSequences& packed, const Tensor& u, const Tensor& delta, const Tensor& A,
               const Tensor& B, const Tensor& C, const OptionalTensor& D, const OptionalTensor& z,
               const OptionalTensor& delta_bias, const OptionalTensor& initial_state, const OptionalTensor& state_offset, const OptionalTensor& output_offset,
               const OptionalTensor& cu_seqlens, bool delta_softplus, const OptionalTensor& chunk_states,
               bool may_segment = true) {
  STD_TORCH_CHECK(u.dim() == 3 && A.dim() == 2, "u must have shape (batch, dim, seqlen) and A (dim, dstate)");
  p.batch = u.size(0), p.dim = u.size(1), p.seqlen = u.size(2), p.dstate = A.size(1);
  check_sizes({p.batch, p.dim, p.seqlen, p.dstate});
  const int64_t groups = B.dim() == 4 ? B.size(1) : 1, max_ranges = max_scan_ranges(p.dim, p.dstate);
  STD_TORCH_CHECK(groups >= 1 && p.dim % groups == 0 && B.dim() == C.dim(), "B and C must share groups that divide dim");
  p.segments = cu_seqlens || !may_segment ? 1 : count_segments(p.batch, p.dim, p.seqlen);
  p.rows = p.batch * p.segments;
  packed.bounds = sequence_bounds("selective_scan", cu_seqlens, p.batch, p.seqlen);
  if (cu_seqlens) {
    p.bounds = packed.bounds.data();
    p.rows = static_cast<int64_t>(packed.bounds.size()) - 1;
    p.partition = make_partition(packed.bounds, p.dim, max_ranges, groups, packed.group_begin);
  } else {
    p.partition = make_partition(p.rows, p.dim, max_ranges, groups);
  }
  const Shape sequence_shape{p.batch, p.dim, p.seqlen}, state_shape{p.batch, p.dstate, p.seqlen};
  const DType dtype = dtype_of(u, "u");
  p.u = sequence(u, "u", sequence_shape, dtype);
  p.delta = sequence(delta, "delta", sequence_shape, dtype);
  p.z = sequence(z, "z", sequence_shape, dtype);
  p.B = states(B, "B", state_shape, groups, dtype);
  p.C = states(C, "C", state_shape, groups, dtype);
  p.A = contiguous(A, "A", {p.dim, p.dstate});
  p.D = contiguous(D, "D", {p.dim});
  p.delta_bias = contiguous(delta_bias, "delta_bias", {p.dim});
  p.initial_state = channel_parameter(initial_state, "initial_state", p.sequences(), {p.dim, p.dstate});
  p.state_offset = channel_parameter(state_offset, "state_offset", p.sequences(), {p.dim, p.dstate});
  p.output_offset = channel_parameter(output_offset, "output_offset", p.sequences(), {p.dim});
  p.delta_softplus = delta_softplus;
  p.chunk_states =
      contiguous(chunk_states, "chunk_states", {p.batch, p.first_chunk(p.rows) / p.batch, p.kept_channels(), p.dstate});
}

int64_t work(const SelectiveScanParams& p) { return p.batch * p.dim * p.seqlen * p.dstate; }

// What reaches the other end of a segment, (dim, dstate): what arises within it, and what decays on its way through.
void cross_segment(const SelectiveScanParams& p, const float* step_sum, const float* within, const float* before, float* after) {
  for (int64_t i = 0; i < p.dim * p.dstate; ++i) {
    // nothing stays nothing, however much it would grow
    after[i] = within[i] + (before[i] == 0.0f ? 0.0f : std::exp(p.A[i] * step_sum[i / p.dstate]) * before[i]);
  }
}

// The state before each segment, (rows, dim, dstate): the first pass scans each from zero.
Buffer first_states(SelectiveScanForward p) {
  const int64_t size = p.dim * p.dstate;
  const ChannelParameter initial_state = p.initial_state;
  Buffer within = allocate(p.rows * size), step_sums = allocate(p.rows * p.dim), states = allocate(p.rows * size);
  p.initial_state = p.state_offset = p.output_offset = {};
  p.D = p.chunk_states = nullptr;
  p.z = p.out = {};
  p.last_state = within.get(), p.step_sums = step_sums.get();
  run(kernels().selective_scan_fwd, p, work(p));
  for (int64_t r = 0; r < p.rows; ++r) {
    float* const state = states.get() + r * size;
    if (!p.begins_sequence(p.row(r))) {
      cross_segment(p, step_sums.get() + (r - 1) * p.dim, within.get() + (r - 1) * size, state - size, state);
    } else if (initial_state.data) {
      std::copy_n(initial_state.data + p.sequence(r) * initial_state.batch_stride, size, state);
    } else {
      std::fill_n(state, size, 0.0f);
    }
  }
  return states;
}

// The gradient of the state after each segment, the same way from the end on.
Buffer last_gradients(SelectiveScanBackward p) {
  const int64_t size = p.dim * p.dstate;
  const float* const dlast_state = p.dlast_state;
  Buffer within = allocate(p.rows * size), step_sums = allocate(p.rows * p.dim), gradients = allocate(p.rows * size);
  p.du = p.ddelta = p.dz = {};
  p.dA = p.dD = p.ddelta_bias = p.dinitial_state = p.dstate_offset = p.doutput_offset = {};
  p.dBC = nullptr, p.dlast_state = nullptr;
  p.dfirst_state = within.get(), p.step_sums = step_sums.get();
  run(kernels().selective_scan_bwd, p, 2 * work(p));
  for (int64_t r = p.rows - 1; r >= 0; --r) {
    float* const gradient = gradients.get() + r * size;
    if (!p.ends_sequence(p.row(r))) {
      cross_segment(p, step_sums.get() + (r + 1) * p.dim, within.get() + (r + 1) * size, gradient + size, gradient);
    } else if (dlast_state) {
      std::copy_n(dlast_state + p.sequence(r) * size, size, gradient);
    } else {
      std::fill_n(gradient, size, 0.0f);
    }
  }
  return gradients;
}

void selective_scan_fwd(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
                        const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& delta_bias,
                        const OptionalTensor& initial_state, const OptionalTensor& state_offset,
                        const OptionalTensor& output_offset, const OptionalTensor& cu_seqlens, bool delta_softplus,
                        const Tensor& out, const Tensor& last_state, const OptionalTensor& chunk_states) {
  SelectiveScanForward p{};
  PackedSequences packed;
  fill_scan(p, packed, u, delta, A, B, C, D, z, delta_bias, initial_state, state_offset, output_offset, cu_seqlens,
            delta_softplus, chunk_states);
  p.out = result(out, "out", {p.batch, p.dim, p.seqlen}, p.u.dtype);
  p.last_state = contiguous(last_state, "last_state", {p.sequences(), p.dim, p.dstate});
  if (chunk_states) prefer_huge_pages(p.chunk_states, chunk_states->numel() * sizeof(float));
  if (p.segments == 1) return run(kernels().selective_scan_fwd, p, work(p));

  const int64_t size = p.dim * p.dstate;
  const Buffer states = first_states(p), last_states = allocate(p.rows * size);
  float* const target = std::exchange(p.last_state, last_states.get());
  p.initial_state = {states.get(), size};
  run(kernels().selective_scan_fwd, p, work(p));
  for (int64_t i = 0; i < p.batch; ++i) {
    std::copy_n(last_states.get() + ((i + 1) * p.segments - 1) * size, size, target + i * size);
  }
}

// Adds up the ranges' shares of dB and dC, in their order: for each row of the batch and group, those of its channels.
void reduce_dBC(const SelectiveScanBackward& p, const float* shares, float* dB, float* dC) {
  const int64_t ranges = p.partition.section_ranges(), row = 2 * p.padded_states();
  parallel_for(0, p.batch * p.partition.sections * p.seqlen, 256, [&](int64_t begin, int64_t end) {
    std::vector<float> sum(row);
    for (int64_t step = begin; step < end; ++step) {
      const float* share = shares + (step / p.seqlen * ranges * p.seqlen + step % p.seqlen) * row;
      std::copy_n(share, row, sum.data());
      for (int64_t range = 1; range < ranges; ++range) {
        share += p.seqlen * row;
        for (int64_t i = 0; i < row; ++i) sum[i] += share[i];
      }
      if (dB) std::copy_n(sum.data(), p.dstate, dB + step * p.dstate);
      if (dC) std::copy_n(sum.data() + p.padded_states(), p.dstate, dC + step * p.dstate);
    }
  });
}

// dB and dC are views of contiguous tensors with the last two axes the other way round, like B and C with groups or without.
float* state_gradient(const OptionalTensor& x, const char* name, const SelectiveScanParams& p, bool grouped) {
  if (!x) return nullptr;
  Shape shape{p.batch, p.dstate, p.seqlen};
  if (grouped) shape.insert(shape.begin() + 1, p.partition.sections);
  check_shape(*x, name, shape);
  STD_TORCH_CHECK(x->scalar_type() == ScalarType::Float && torch::stable::transpose(*x, -2, -1).is_contiguous(), name,
                  " must be float32 and the transpose of a contiguous (batch, seqlen, dstate) tensor");
  return static_cast<float*>(x->data_ptr());
}

// Whether a gradient has a row for each sequence, which one task writes: then that is not cut into segments.
bool has_rows(const OptionalTensor& gradient, int64_t shared_axes) { return gradient && gradient->dim() > shared_axes; }

void selective_scan_bwd(const OptionalTensor& dout, const OptionalTensor& dlast_state, const Tensor& u, const Tensor& delta,
                        const Tensor& A, const Tensor& B, const Tensor& C, const OptionalTensor& D, const OptionalTensor& z,
                        const OptionalTensor& delta_bias, const OptionalTensor& initial_state,
                        const OptionalTensor& state_offset, const OptionalTensor& output_offset,
                        const OptionalTensor& cu_seqlens, const Tensor& chunk_states, bool delta_softplus,
                        const OptionalTensor& du, const OptionalTensor& ddelta, const OptionalTensor& dA,
                        const OptionalTensor& dB, const OptionalTensor& dC, const OptionalTensor& dD, const OptionalTensor& dz,
                        const OptionalTensor& ddelta_bias, const OptionalTensor& dinitial_state,
                        const OptionalTensor& dstate_offset, const OptionalTensor& doutput_offset) {
  SelectiveScanBackward p{};
  PackedSequences packed;
  fill_scan(p, packed, u, delta, A, B, C, D, z, delta_bias, initial_state, state_offset, output_offset, cu_seqlens,
            delta_softplus, chunk_states, !has_rows(dstate_offset, 2) && !has_rows(doutput_offset, 1));
  const Shape sequence_shape{p.batch, p.dim, p.seqlen}, matrix_shape{p.dim, p.dstate}, vector_shape{p.dim};
  STD_TORCH_CHECK(!dz || z, "dz was asked for without z");
  p.dout = sequence(dout, "dout", sequence_shape, p.u.dtype);
  p.du = result(du, "du", sequence_shape, p.u.dtype);
  p.ddelta = result(ddelta, "ddelta", sequence_shape, p.u.dtype);
  p.dz = result(dz, "dz", sequence_shape, p.u.dtype);
  p.dlast_state = contiguous(dlast_state, "dlast_state", {p.sequences(), p.dim, p.dstate});
  float* const dB_target = state_gradient(dB, "dB", p, B.dim() == 4);
  float* const dC_target = state_gradient(dC, "dC", p, C.dim() == 4);
  Buffer dBC;
  if (dB || dC) dBC = allocate(p.batch * p.partition.ranges * p.seqlen * 2 * p.padded_states());
  p.dBC = dBC.get();
  Gradient gradients[] = {{dA, "dA", p.partition, p.sequences(), matrix_shape},
                          {dD, "dD", p.partition, p.sequences(), vector_shape},
                          {ddelta_bias, "ddelta_bias", p.partition, p.sequences(), vector_shape},
                          {dinitial_state, "dinitial_state", p.partition, p.sequences(), matrix_shape},
                          {dstate_offset, "dstate_offset", p.partition, p.sequences(), matrix_shape},
                          {doutput_offset, "doutput_offset", p.partition, p.sequences(), vector_shape}};
  p.dA = gradients[0].get(), p.dD = gradients[1].get(), p.ddelta_bias = gradients[2].get();
  p.dinitial_state = gradients[3].get(), p.dstate_offset = gradients[4].get(), p.doutput_offset = gradients[5].get();

  Buffer dlast_states;
  if (p.segments > 1) {
    dlast_states = last_gradients(p);
    p.dlast_state = dlast_states.get();
  }
  run(kernels().selective_scan_bwd, p, 2 * work(p));
  if (p.dBC) reduce_dBC(p, p.dBC, dB_target, dC_target);
  for (const Gradient& gradient : gradients) gradient.finish();
}

}  // namespace
}  // namespace ssmtune

STABLE_TORCH_LIBRARY_IMPL(ssmtune_native, CPU, m) {
  m.impl("selective_scan_fwd", TORCH_BOX(&ssmtune::selective_scan_fwd));
  m.impl("selective_scan_bwd", TORCH_BOX(&ssmtune::selective_scan_bwd));
}
