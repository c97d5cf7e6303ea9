#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "gradient.h"
#include "tasks.h"

namespace ssmtune {
namespace {

// Sums over ranges of heads are kept until the end; they may take about as much memory as x. A range makes the scores of its
// group anew, which is another reason for few of them.
int64_t max_head_ranges(const SsdScanParams& p) {
  return std::max<int64_t>(4, p.heads * p.headdim / (2 * p.dstate));
}

// (batch, seqlen, heads, size), of which the last two axes are dense.
HeadTensor head_tensor(const Tensor& x, const char* name, const Shape& shape, DType dtype) {
  check_shape(x, name, shape);
  STD_TORCH_CHECK(dtype_of(x, name) == dtype, name, " must have the dtype of the input");
  STD_TORCH_CHECK((x.stride(3) == 1 || shape[3] == 1) && (x.stride(2) == shape[3] || shape[2] == 1), name,
                  " must be dense along its last two axes");
  return {x.data_ptr(), dtype, x.stride(0), x.stride(1)};
}
HeadTensor head_tensor(const OptionalTensor& x, const char* name, const Shape& shape, DType dtype) {
  return x ? head_tensor(*x, name, shape, dtype) : HeadTensor{};
}

// What the parameters of one call point to besides tensors.
struct PackedSequences {
  std::vector<int64_t> bounds, group_begin;
};

void fill_scan(SsdScanParams& p, PackedSequences& packed, const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B,
               const Tensor& C, const OptionalTensor& D, const OptionalTensor& dt_bias, const OptionalTensor& initial_states,
               const OptionalTensor& state_offset, const OptionalTensor& output_offset, const OptionalTensor& cu_seqlens,
               bool dt_softplus, double dt_min, double dt_max, const OptionalTensor& chunk_states) {
  STD_TORCH_CHECK(x.dim() == 4 && B.dim() == 4, "x must have shape (batch, seqlen, heads, headdim), B (batch, seqlen, groups, dstate)");
  p.batch = x.size(0), p.seqlen = x.size(1), p.heads = x.size(2), p.headdim = x.size(3);
  p.groups = B.size(2), p.dstate = B.size(3);
  check_sizes({p.batch, p.seqlen, p.heads, p.headdim, p.groups, p.dstate});
  STD_TORCH_CHECK(p.heads % p.groups == 0, "B and C must have groups that divide the heads");
  const int64_t units = p.heads * Partition::kUnit, max_ranges = max_head_ranges(p);
  packed.bounds = sequence_bounds("ssd_scan", cu_seqlens, p.batch, p.seqlen);
  p.rows = p.batch;
  if (cu_seqlens) {
    p.bounds = packed.bounds.data();
    p.rows = static_cast<int64_t>(packed.bounds.size()) - 1;
    p.partition = make_partition(packed.bounds, units, max_ranges, p.groups, packed.group_begin);
  } else {
    p.partition = make_partition(p.rows, units, max_ranges, p.groups);
  }
  const DType dtype = dtype_of(x, "x");
  const Shape group_shape{p.batch, p.seqlen, p.groups, p.dstate}, state_shape{p.heads, p.headdim, p.dstate};
  p.x = head_tensor(x, "x", {p.batch, p.seqlen, p.heads, p.headdim}, dtype);
  p.B = head_tensor(B, "B", group_shape, dtype);
  p.C = head_tensor(C, "C", group_shape, dtype);
  p.dt = contiguous(dt, "dt", {p.batch, p.seqlen, p.heads});
  p.A = contiguous(A, "A", {p.heads});
  p.D = contiguous(D, "D", {p.heads, p.headdim});
  p.dt_bias = contiguous(dt_bias, "dt_bias", {p.heads});
  p.dt_softplus = dt_softplus, p.dt_min = static_cast<float>(dt_min), p.dt_max = static_cast<float>(dt_max);
  p.initial_states = channel_parameter(initial_states, "initial_states", p.rows, state_shape);
  p.state_offset = channel_parameter(state_offset, "state_offset", p.rows, state_shape);
  p.output_offset = channel_parameter(output_offset, "output_offset", p.rows, {p.heads, p.headdim});
  const int64_t kept = p.bounds ? (p.seqlen - p.rows) / kSsdChunk : (p.seqlen - 1) / kSsdChunk;
  p.chunk_states = contiguous(chunk_states, "chunk_states", {p.batch, kept, p.heads, p.headdim, p.dstate});
}

int64_t work(const SsdScanParams& p) { return p.batch * p.seqlen * p.heads * p.headdim * p.dstate / 4; }

void ssd_scan_fwd(const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C, const OptionalTensor& D,
                  const OptionalTensor& dt_bias, const OptionalTensor& initial_states, const OptionalTensor& state_offset,
                  const OptionalTensor& output_offset, const OptionalTensor& cu_seqlens, bool dt_softplus, double dt_min,
                  double dt_max, const Tensor& out, const Tensor& final_states, const OptionalTensor& chunk_states) {
  SsdScanForward p{};
  PackedSequences packed;
  fill_scan(p, packed, x, dt, A, B, C, D, dt_bias, initial_states, state_offset, output_offset, cu_seqlens, dt_softplus, dt_min,
            dt_max, chunk_states);
  p.out = head_tensor(out, "out", {p.batch, p.seqlen, p.heads, p.headdim}, p.x.dtype);
  p.final_states = contiguous(final_states, "final_states", {p.rows, p.heads, p.headdim, p.dstate});
  if (chunk_states) prefer_huge_pages(p.chunk_states, chunk_states->numel() * sizeof(float));
  run(kernels().ssd_scan_fwd, p, work(p));
}

// Adds up the ranges' shares of dB and dC, in their order: for each group, those of its heads.
void reduce_dBC(const SsdScanBackward& p, float* dB, float* dC) {
  const int64_t ranges = p.partition.section_ranges(), row = 2 * p.dstate;
  parallel_for(0, p.batch * p.seqlen, 256, [&](int64_t begin, int64_t end) {
    std::vector<float> sum(row);
    for (int64_t step = begin; step < end; ++step) {
      for (int64_t group = 0; group < p.groups; ++group) {
        const int64_t first = step / p.seqlen * p.partition.ranges + group * ranges;
        const float* share = p.dBC + (first * p.seqlen + step % p.seqlen) * row;
        std::copy_n(share, row, sum.data());
        for (int64_t range = 1; range < ranges; ++range) {
          share += p.seqlen * row;
          for (int64_t i = 0; i < row; ++i) sum[i] += share[i];
        }
        const int64_t at = (step * p.groups + group) * p.dstate;
        if (dB) std::copy_n(sum.data(), p.dstate, dB + at);
        if (dC) std::copy_n(sum.data() + p.dstate, p.dstate, dC + at);
      }
    }
  });
}

void ssd_scan_bwd(const OptionalTensor& dout, const OptionalTensor& dfinal_states, const Tensor& x, const Tensor& dt,
                  const Tensor& A, const Tensor& B, const Tensor& C, const OptionalTensor& D, const OptionalTensor& dt_bias,
                  const OptionalTensor& initial_states, const OptionalTensor& state_offset, const OptionalTensor& output_offset,
                  const OptionalTensor& cu_seqlens, const Tensor& chunk_states, bool dt_softplus, double dt_min, double dt_max,
                  const OptionalTensor& dx, const OptionalTensor& ddt, const OptionalTensor& dA, const OptionalTensor& dB,
                  const OptionalTensor& dC, const OptionalTensor& dD, const OptionalTensor& ddt_bias,
                  const OptionalTensor& dinitial_states, const OptionalTensor& dstate_offset,
                  const OptionalTensor& doutput_offset) {
  SsdScanBackward p{};
  PackedSequences packed;
  fill_scan(p, packed, x, dt, A, B, C, D, dt_bias, initial_states, state_offset, output_offset, cu_seqlens, dt_softplus, dt_min,
            dt_max, chunk_states);
  const Shape shape{p.batch, p.seqlen, p.heads, p.headdim}, group_shape{p.batch, p.seqlen, p.groups, p.dstate};
  const Shape state_shape{p.heads, p.headdim, p.dstate}, channel_shape{p.heads, p.headdim};
  p.dout = head_tensor(dout, "dout", shape, p.x.dtype);
  p.dx = head_tensor(dx, "dx", shape, p.x.dtype);
  p.ddt = contiguous(ddt, "ddt", {p.batch, p.seqlen, p.heads});
  p.dfinal_states = contiguous(dfinal_states, "dfinal_states", {p.rows, p.heads, p.headdim, p.dstate});
  float* const dB_target = contiguous(dB, "dB", group_shape);
  float* const dC_target = contiguous(dC, "dC", group_shape);
  Buffer dBC;
  if (dB || dC) dBC = allocate(p.batch * p.partition.ranges * p.seqlen * 2 * p.dstate);
  p.dBC = dBC.get();
  Gradient gradients[] = {{dA, "dA", p.partition, p.rows, {p.heads}},
                          {dD, "dD", p.partition, p.rows, channel_shape},
                          {ddt_bias, "ddt_bias", p.partition, p.rows, {p.heads}},
                          {dinitial_states, "dinitial_states", p.partition, p.rows, state_shape},
                          {dstate_offset, "dstate_offset", p.partition, p.rows, state_shape},
                          {doutput_offset, "doutput_offset", p.partition, p.rows, channel_shape}};
  p.dA = gradients[0].get(), p.dD = gradients[1].get(), p.ddt_bias = gradients[2].get();
  p.dinitial_states = gradients[3].get(), p.dstate_offset = gradients[4].get(), p.doutput_offset = gradients[5].get();
  run(kernels().ssd_scan_bwd, p, 2 * work(p));
  if (p.dBC) reduce_dBC(p, dB_target, dC_target);
  for (const Gradient& gradient : gradients) gradient.finish();
}

}  // namespace
}  // namespace ssmtune

STABLE_TORCH_LIBRARY_IMPL(ssmtune_native, CPU, m) {
  m.impl("ssd_scan_fwd", TORCH_BOX(&ssmtune::ssd_scan_fwd));
  m.impl("ssd_scan_bwd", TORCH_BOX(&ssmtune::ssd_scan_bwd));
}
