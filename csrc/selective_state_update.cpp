#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <vector>

#include "tasks.h"
#include "tensors.h"

namespace ssmtune {
namespace {

// Hands out contiguous memory of tensors, copying those that are not, or not of the dtype asked for; the copies live as long
// as this does.
class Contiguous {
 public:
  const void* get(const Tensor& x, const char* name, const Shape& shape, ScalarType dtype) {
    check_shape(x, name, shape);
    if (x.scalar_type() == dtype && x.is_contiguous()) return x.data_ptr();
    return copy(x, name, shape, dtype).data_ptr();
  }
  const Tensor& copy(const Tensor& x, const char* name, const Shape& shape, ScalarType dtype) {
    check_shape(x, name, shape);
    if (x.scalar_type() != ScalarType::Double) dtype_of(x, name);
    copies_.push_back(torch::stable::contiguous(x.scalar_type() == dtype ? x : torch::stable::to(x, dtype)));
    return copies_.back();
  }
  const void* get(const OptionalTensor& x, const char* name, const Shape& shape, ScalarType dtype) {
    return x ? get(*x, name, shape, dtype) : nullptr;
  }
  const float* get(const OptionalTensor& x, const char* name, const Shape& shape) {
    return static_cast<const float*>(get(x, name, shape, ScalarType::Float));
  }
  ChannelParameter channel_parameter(const OptionalTensor& x, const char* name, int64_t batch, Shape shape) {
    if (!x) return {};
    int64_t row = 1;
    for (const int64_t size : shape) row *= size;
    const bool shared = x->dim() == static_cast<int64_t>(shape.size());
    if (!shared) shape.insert(shape.begin(), batch);
    return {get(x, name, shape), shared ? 0 : row};
  }

 private:
  std::vector<Tensor> copies_;
};

Tensor selective_state_update(const Tensor& state, const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B,
                              const Tensor& C, const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& dt_bias,
                              bool dt_softplus, const OptionalTensor& state_offset, const OptionalTensor& output_offset) {
  STD_TORCH_CHECK(state.dim() == 3, "state must have shape (batch, dim, dstate)");
  SelectiveStateUpdate p{};
  p.batch = state.size(0), p.dim = state.size(1), p.dstate = state.size(2);
  check_sizes({p.batch, p.dim, p.dstate});
  p.dtype = dtype_of(x, "x");
  const Shape channel_shape{p.batch, p.dim}, state_shape{p.batch, p.dstate};
  const Shape full_shape{p.batch, p.dim, p.dstate};
  Contiguous memory;
  const bool in_place = state.scalar_type() == ScalarType::Float && state.is_contiguous();
  check_not_expanded(state, "state");
  Tensor work = in_place ? state : memory.copy(state, "state", full_shape, ScalarType::Float);
  p.state = contiguous(work, "state", full_shape);
  const ScalarType dtype = x.scalar_type();
  const Tensor out = torch::stable::new_empty(x, {p.batch, p.dim});
  p.x = memory.get(x, "x", channel_shape, dtype);
  p.dt = memory.get(dt, "dt", channel_shape, dtype);
  p.z = memory.get(z, "z", channel_shape, dtype);
  p.B = memory.get(B, "B", state_shape, dtype);
  p.C = memory.get(C, "C", state_shape, dtype);
  p.A = memory.get(A, "A", {p.dim, p.dstate});
  p.D = memory.get(D, "D", {p.dim});
  p.dt_bias = memory.get(dt_bias, "dt_bias", {p.dim});
  p.dt_softplus = dt_softplus;
  p.state_offset = memory.channel_parameter(state_offset, "state_offset", p.batch, {p.dim, p.dstate});
  p.output_offset = memory.channel_parameter(output_offset, "output_offset", p.batch, {p.dim});
  p.out = out.data_ptr();
  run_update(kernels().selective_state_update, p, p.batch * p.dim * p.dstate);
  if (!in_place) {
    Tensor target = state;
    torch::stable::copy_(target, work);
  }
  return out;
}

}  // namespace
}  // namespace ssmtune

STABLE_TORCH_LIBRARY_IMPL(ssmtune_native, CPU, m) {
  m.impl("selective_state_update", TORCH_BOX(&ssmtune::selective_state_update));
}
