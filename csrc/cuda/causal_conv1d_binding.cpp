#include "cuda/causal_conv1d.h"

#include "causal_conv1d_update.h"
#include "cuda/binding.h"

namespace ssmtune::cuda {
namespace {

void fill(CausalConv1dParams& p, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
          const OptionalTensor& initial_states, const PackedSequences& packed, bool silu) {
  p.batch = x.size(0), p.dim = x.size(1), p.seqlen = x.size(2), p.width = weight.size(1);
  check_sizes({p.batch, p.dim, p.seqlen, p.width});
  STD_TORCH_CHECK(p.width <= kFilter, "the CUDA kernels take filters of width ", kFilter, " at most, got ", p.width);
  p.sequences = packed.rows;
  p.cu_seqlens = packed.bounds();
  p.x = sequence(x, "x", {p.batch, p.dim, p.seqlen}, dtype_of(x, "x"));
  p.weight = contiguous(weight, "weight", {p.dim, p.width});
  p.bias = contiguous(bias, "bias", {p.dim});
  p.initial_states = contiguous(initial_states, "initial_states", {p.sequences, p.dim, p.width - 1});
  p.silu = silu;
}

// The states after each sequence; with a width of 1 there are none.
SequenceTensor final_states(const OptionalTensor& x, const char* name, const CausalConv1dParams& p) {
  if (!x || p.width == 1) return {};
  return sequence(x, name, {p.sequences, p.dim, p.width - 1}, p.x.dtype);
}

void check_dimensions(const Tensor& x, const Tensor& weight) {
  STD_TORCH_CHECK(x.dim() == 3 && weight.dim() == 2, "x must have shape (batch, dim, seqlen) and weight (dim, width)");
}

void fwd(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& initial_states,
         const OptionalTensor& cu_seqlens, bool silu, const Tensor& out, const OptionalTensor& final_states_out) {
  const Place place(x, weight, bias, initial_states, cu_seqlens, out, final_states_out);
  check_dimensions(x, weight);
  const PackedSequences packed("causal_conv1d", cu_seqlens, x.size(0));
  CausalConv1dForward p{};
  fill(p, x, weight, bias, initial_states, packed, silu);
  p.out = sequence(out, "out", {p.batch, p.dim, p.seqlen}, p.x.dtype);
  p.final_states = final_states(final_states_out, "final_states", p);
  check_launch("causal_conv1d", causal_conv1d_fwd(p, place.stream()));
}

void bwd(const Tensor& dout, const OptionalTensor& dfinal_states, const Tensor& x, const Tensor& weight,
         const OptionalTensor& bias, const OptionalTensor& initial_states, const OptionalTensor& cu_seqlens, bool silu,
         const OptionalTensor& dx, const OptionalTensor& dweight, const OptionalTensor& dbias,
         const OptionalTensor& dinitial_states) {
  const Place place(x, dout, dfinal_states, weight, bias, initial_states, cu_seqlens, dx, dweight, dbias, dinitial_states);
  check_dimensions(x, weight);
  const PackedSequences packed("causal_conv1d", cu_seqlens, x.size(0));
  CausalConv1dBackward p{};
  fill(p, x, weight, bias, initial_states, packed, silu);
  p.dout = sequence(dout, "dout", {p.batch, p.dim, p.seqlen}, p.x.dtype);
  p.dx = sequence(dx, "dx", {p.batch, p.dim, p.seqlen}, p.x.dtype);
  p.dfinal_states = final_states(dfinal_states, "dfinal_states", p);
  p.dweight = contiguous(dweight, "dweight", {p.dim, p.width});
  p.dbias = contiguous(dbias, "dbias", {p.dim});
  p.dinitial_states = contiguous(dinitial_states, "dinitial_states", {p.sequences, p.dim, p.width - 1});
  OptionalTensor shares;
  if (p.dweight || p.dbias) {
    shares = torch::stable::new_empty(x, {backward_tiles(p).shares(), kFilter + 1, p.dim}, ScalarType::Float);
    p.shares = static_cast<float*>(shares->data_ptr());
  }
  check_launch("causal_conv1d", causal_conv1d_bwd(p, place.stream()));
}

Tensor update(const Tensor& x, const Tensor& conv_state, const Tensor& weight, const OptionalTensor& bias, bool silu) {
  const Place place(x, conv_state, weight, bias);
  const auto [p, out] = causal_conv1d_update_arguments(x, conv_state, weight, bias, silu);
  check_launch("causal_conv1d_update", causal_conv1d_update(p, place.stream()));
  return out;
}

}  // namespace
}  // namespace ssmtune::cuda

SSMTUNE_CUDA_IMPL(m) {
  m.impl("causal_conv1d_fwd", TORCH_BOX(&ssmtune::cuda::fwd));
  m.impl("causal_conv1d_bwd", TORCH_BOX(&ssmtune::cuda::bwd));
  m.impl("causal_conv1d_update", TORCH_BOX(&ssmtune::cuda::update));
}
