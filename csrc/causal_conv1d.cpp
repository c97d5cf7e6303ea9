#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "causal_conv1d_update.h"
#include "gradient.h"
#include "tasks.h"

namespace ssmtune {
namespace {

// Rows of the batch are cut along time where memory has the steps of all channels one after the other: tasks that share them
// by channels would each read scattered pieces of it.
int64_t pieces_of_rows(const Tensor& x, const SequenceTensor& layout) {
  constexpr int64_t kLeast = 128;  // steps of a piece: it looks at a few of those before and after it too
  const int64_t wanted = (kTasks + x.size(0) - 1) / x.size(0);
  return layout.channels_last ? std::clamp<int64_t>(x.size(2) / kLeast, 1, wanted) : 1;
}

// `bounds` must outlive the parameters.
void fill_conv(CausalConv1dParams& p, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
               const OptionalTensor& initial_states, const std::vector<int64_t>& bounds, bool silu) {
  STD_TORCH_CHECK(x.dim() == 3 && weight.dim() == 2, "x must have shape (batch, dim, seqlen) and weight (dim, width)");
  p.dim = x.size(1), p.seqlen = x.size(2), p.width = weight.size(1);
  check_sizes({x.size(0), p.dim, p.seqlen, p.width});
  p.bounds = bounds.empty() ? nullptr : bounds.data();
  p.sequences = p.bounds ? static_cast<int64_t>(bounds.size()) - 1 : x.size(0);
  p.x = sequence(x, "x", {x.size(0), p.dim, p.seqlen}, dtype_of(x, "x"));
  p.pieces = pieces_of_rows(x, p.x);
  p.partition = make_partition(x.size(0) * p.pieces, p.dim, p.dim);
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

void causal_conv1d_fwd(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& initial_states,
                       const OptionalTensor& cu_seqlens, bool silu, const Tensor& out, const OptionalTensor& final_states_out) {
  CausalConv1dForward p{};
  const std::vector<int64_t> bounds = sequence_bounds("causal_conv1d", cu_seqlens, x.size(0), x.size(-1));
  fill_conv(p, x, weight, bias, initial_states, bounds, silu);
  p.out = result(out, "out", {x.size(0), p.dim, p.seqlen}, p.x.dtype);
  p.final_states = final_states(final_states_out, "final_states", p);
  run(kernels().causal_conv1d_fwd, p, x.size(0) * p.dim * p.seqlen);
}

void causal_conv1d_bwd(const Tensor& dout, const OptionalTensor& dfinal_states, const Tensor& x, const Tensor& weight,
                       const OptionalTensor& bias, const OptionalTensor& initial_states, const OptionalTensor& cu_seqlens,
                       bool silu, const OptionalTensor& dx, const OptionalTensor& dweight, const OptionalTensor& dbias,
                       const OptionalTensor& dinitial_states) {
  CausalConv1dBackward p{};
  const std::vector<int64_t> bounds = sequence_bounds("causal_conv1d", cu_seqlens, x.size(0), x.size(-1));
  fill_conv(p, x, weight, bias, initial_states, bounds, silu);
  const Shape sequence_shape{x.size(0), p.dim, p.seqlen};
  p.dout = sequence(dout, "dout", sequence_shape, p.x.dtype);
  p.dx = result(dx, "dx", sequence_shape, p.x.dtype);
  p.dfinal_states = final_states(dfinal_states, "dfinal_states", p);
  p.dinitial_states = contiguous(dinitial_states, "dinitial_states", {p.sequences, p.dim, p.width - 1});
  Gradient weight_gradient(dweight, "dweight", p.partition, p.partition.batch, {p.dim, p.width});
  Gradient bias_gradient(dbias, "dbias", p.partition, p.partition.batch, {p.dim});
  p.dweight = weight_gradient.get();
  p.dbias = bias_gradient.get();
  run(kernels().causal_conv1d_bwd, p, 2 * x.size(0) * p.dim * p.seqlen);
  weight_gradient.finish();
  bias_gradient.finish();
}

Tensor causal_conv1d_update(const Tensor& x, const Tensor& conv_state, const Tensor& weight, const OptionalTensor& bias,
                            bool silu) {
  const auto [p, out] = causal_conv1d_update_arguments(x, conv_state, weight, bias, silu);
  run_update(kernels().causal_conv1d_update, p, p.batch * p.dim * p.width);
  return out;
}

}  // namespace
}  // namespace ssmtune

STABLE_TORCH_LIBRARY_IMPL(ssmtune_native, CPU, m) {
  m.impl("causal_conv1d_fwd", TORCH_BOX(&ssmtune::causal_conv1d_fwd));
  m.impl("causal_conv1d_bwd", TORCH_BOX(&ssmtune::causal_conv1d_bwd));
  m.impl("causal_conv1d_update", TORCH_BOX(&ssmtune::causal_conv1d_update));
}
