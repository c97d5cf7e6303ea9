// The arguments of causal_conv1d_update, checked, for the kernels of any device.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <utility>

#include "tensors.h"

namespace ssmtune {

// What a kernel is called with, and the result that it writes.
inline std::pair<CausalConv1dUpdate, Tensor> causal_conv1d_update_arguments(const Tensor& x, const Tensor& conv_state,
                                                                            const Tensor& weight, const OptionalTensor& bias,
                                                                            bool silu) {
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2, "x must have shape (batch, dim) and weight (dim, width)");
  CausalConv1dUpdate p{};
  p.batch = x.size(0), p.dim = x.size(1), p.width = weight.size(1);
  check_sizes({p.batch, p.dim, p.width});
  const Tensor out = torch::stable::new_empty(x, {p.batch, p.dim});
  p.x = strided(x, "x", {p.batch, p.dim});
  p.out = strided(out, "out", {p.batch, p.dim});
  p.state = strided(conv_state, "conv_state", {p.batch, p.dim, p.width - 1});
  check_not_expanded(conv_state, "conv_state");
  p.weight = strided(weight, "weight", {p.dim, p.width});
  if (bias) p.bias = strided(*bias, "bias", {p.dim});
  p.silu = silu;
  return {p, out};
}

}  // namespace ssmtune
