#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "gradient.h"
#include "tasks.h"

namespace ssmtune {
namespace {

// Sums over ranges of channels are kept until the end; they may take about a third of the memory of u.
int64_t max_scan_ranges(int64_t dim, int64_t dstate) { return std::max<int64_t>(4, dim / (6 * dstate)); }

// What the parameters of one call point to besides tensors.
struct PackedSequences {
  std::vector<int64_t> bounds, group_begin;
};

void fill_scan(SelectiveScanParams& p, PackedSequences& packed, const Tensor& u, const Tensor& delta, const Tensor& A,
               const Tensor& B, const Tensor& C, const OptionalTensor& D, const OptionalTensor& z,
               const OptionalTensor& delta_bias, const OptionalTensor& initial_state, const OptionalTensor& state_offset, const OptionalTensor& output_offset,
               const OptionalTensor& cu_seqlens, bool delta_softplus, const OptionalTensor& chunk_states) {
  STD_TORCH_CHECK(u.dim() == 3 && A.dim() == 2, "u must have shape (batch, dim, seqlen) and A (dim, dstate)");
  p.batch = u.size(0), p.dim = u.size(1), p.seqlen = u.size(2), p.dstate = A.size(1);
  check_sizes({p.batch, p.dim, p.seqlen, p.dstate});
  const int64_t groups = B.dim() == 4 ? B.size(1) : 1, max_ranges = max_scan_ranges(p.dim, p.dstate);
  STD_TORCH_CHECK(groups >= 1 && p.dim % groups == 0 && B.dim() == C.dim(), "B and C must share groups that divide dim");
  p.rows = p.batch;
  packed.bounds = sequence_bounds("selective_scan", cu_seqlens, p.batch, p.seqlen);
  if (cu_seqlens) {
    p.bounds = packed.bounds.data();
    p.rows = static_cast<int64_t>(packed.bounds.size()) - 1;
    p.partition = make_partition(packed.bounds, p.dim, max_ranges, groups, packed.group_begin);
  } else {
    p.partition = make_partition(p.batch, p.dim, max_ranges, groups);
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
  p.initial_state = channel_parameter(initial_state, "initial_state", p.rows, {p.dim, p.dstate});
  p.state_offset = channel_parameter(state_offset, "state_offset", p.rows, {p.dim, p.dstate});
  p.output_offset = channel_parameter(output_offset, "output_offset", p.rows, {p.dim});
  p.delta_softplus = delta_softplus;
  p.chunk_states =
      contiguous(chunk_states, "chunk_states", {p.batch, p.first_chunk(p.rows) / p.batch, p.kept_channels(), p.dstate});
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
  p.last_state = contiguous(last_state, "last_state", {p.rows, p.dim, p.dstate});
  if (chunk_states) prefer_huge_pages(p.chunk_states, chunk_states->numel() * sizeof(float));
  run(kernels().selective_scan_fwd, p, p.batch * p.dim * p.seqlen * p.dstate);
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
            delta_softplus, chunk_states);
  const Shape sequence_shape{p.batch, p.dim, p.seqlen}, matrix_shape{p.dim, p.dstate}, vector_shape{p.dim};
  STD_TORCH_CHECK(!dz || z, "dz was asked for without z");
  p.dout = sequence(dout, "dout", sequence_shape, p.u.dtype);
  p.du = result(du, "du", sequence_shape, p.u.dtype);
  p.ddelta = result(ddelta, "ddelta", sequence_shape, p.u.dtype);
  p.dz = result(dz, "dz", sequence_shape, p.u.dtype);
  p.dlast_state = contiguous(dlast_state, "dlast_state", {p.rows, p.dim, p.dstate});
  float* const dB_target = state_gradient(dB, "dB", p, B.dim() == 4);
  float* const dC_target = state_gradient(dC, "dC", p, C.dim() == 4);
  Buffer dBC;
  if (dB || dC) dBC = allocate(p.batch * p.partition.ranges * p.seqlen * 2 * p.padded_states());
  p.dBC = dBC.get();
  Gradient gradients[] = {{dA, "dA", p.partition, matrix_shape},
                          {dD, "dD", p.partition, vector_shape},
                          {ddelta_bias, "ddelta_bias", p.partition, vector_shape},
                          {dinitial_state, "dinitial_state", p.partition, matrix_shape},
                          {dstate_offset, "dstate_offset", p.partition, matrix_shape},
                          {doutput_offset, "doutput_offset", p.partition, vector_shape}};
  p.dA = gradients[0].get(), p.dD = gradients[1].get(), p.ddelta_bias = gradients[2].get();
  p.dinitial_state = gradients[3].get(), p.dstate_offset = gradients[4].get(), p.doutput_offset = gradients[5].get();

  run(kernels().selective_scan_bwd, p, 2 * p.batch * p.dim * p.seqlen * p.dstate);
  if (p.dBC) reduce_dBC(p, p.dBC, dB_target, dC_target);
  for (const Gradient& gradient : gradients) gradient.finish();
}

}  // namespace
}  // namespace ssmtune

STABLE_TORCH_LIBRARY_IMPL(ssmtune_native, CPU, m) {
  m.impl("selective_scan_fwd", TORCH_BOX(&ssmtune::selective_scan_fwd));
  m.impl("selective_scan_bwd", TORCH_BOX(&ssmtune::selective_scan_bwd));
}
