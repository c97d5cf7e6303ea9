#include "cuda/selective_state_update.h"

#include "cuda/binding.h"

namespace ssmtune::cuda {
namespace {

// A tensor whose last axis is contiguous, read where it lies: B and C are parts of one projection.
Rows rows(const Tensor& x, const char* name, const Shape& shape, DType dtype) {
  check_shape(x, name, shape);
  const int64_t last = x.dim() - 1;
  STD_TORCH_CHECK(dtype_of(x, name) == dtype, name, " must have the dtype of x");
  STD_TORCH_CHECK(x.stride(last) == 1 || x.size(last) == 1, name, " must have stride 1 along its last axis");
  return {x.data_ptr(), x.stride(0), last == 2 ? x.stride(1) : 0};
}

// B or C: (batch, states), or (batch, groups, states).
Rows states(const Tensor& x, const char* name, const SelectiveStateUpdate& p) {
  Shape shape{p.batch, p.dstate};
  if (x.dim() == 3) shape.insert(shape.begin() + 1, p.groups);
  return rows(x, name, shape, p.dtype);
}

// An offset of `shape` for each adapter, read where it lies.
ChannelParameter adapter_stack(const OptionalTensor& x, const char* name, int64_t adapters, Shape shape) {
  if (!x) return {};
  shape.insert(shape.begin(), adapters);
  check_shape(*x, name, shape);
  STD_TORCH_CHECK(x->scalar_type() == ScalarType::Float && torch::stable::select(*x, 0, 0).is_contiguous(), name,
                  " must be float32, and its entries contiguous");
  return {static_cast<const float*>(x->data_ptr()), x->stride(0)};
}

Tensor update(const Tensor& state, const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B, const Tensor& C,
              const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& dt_bias, bool dt_softplus,
              const OptionalTensor& state_offset, const OptionalTensor& output_offset, const OptionalTensor& adapter_index) {
  const Place place(x, state, dt, A, B, C, D, z, dt_bias, state_offset, output_offset, adapter_index);
  STD_TORCH_CHECK(state.dim() == 3, "state must have shape (batch, dim, dstate)");
  SelectiveStateUpdate p{};
  p.batch = state.size(0), p.dim = state.size(1), p.dstate = state.size(2);
  p.groups = B.dim() == 3 ? B.size(1) : 1;
  check_sizes({p.batch, p.dim, p.dstate, p.groups});
  STD_TORCH_CHECK(p.dim % p.groups == 0 && B.dim() == C.dim(), "B and C must share groups that divide dim");
  STD_TORCH_CHECK(p.dim < int64_t{1} << 31, "the CUDA kernel takes less than 2^31 channels");
  const Shape channels{p.batch, p.dim}, matrix{p.dim, p.dstate};
  p.dtype = dtype_of(x, "x");
  p.state = contiguous(state, "state", {p.batch, p.dim, p.dstate});
  p.x = rows(x, "x", channels, p.dtype);
  p.dt = rows(dt, "dt", channels, p.dtype);
  if (z) p.z = rows(*z, "z", channels, p.dtype);
  p.B = states(B, "B", p);
  p.C = states(C, "C", p);
  p.A = contiguous(A, "A", matrix);
  p.D = contiguous(D, "D", {p.dim});
  p.dt_bias = contiguous(dt_bias, "dt_bias", {p.dim});
  p.dt_softplus = dt_softplus;
  if (adapter_index) {
    STD_TORCH_CHECK(state_offset || output_offset, "adapter_index was given without offsets");
    check_shape(*adapter_index, "adapter_index", {p.batch});
    const bool wide = adapter_index->scalar_type() == ScalarType::Long;
    STD_TORCH_CHECK((wide || adapter_index->scalar_type() == ScalarType::Int) && adapter_index->is_contiguous(),
                    "adapter_index must be int32 or int64, and contiguous");
    const int64_t adapters = (state_offset ? state_offset : output_offset)->size(0);
    check_sizes({adapters});
    p.adapter_index = {adapter_index->data_ptr(), wide, adapters};
    p.state_offset = adapter_stack(state_offset, "state_offset", adapters, matrix);
    p.output_offset = adapter_stack(output_offset, "output_offset", adapters, {p.dim});
  } else {
    p.state_offset = channel_parameter(state_offset, "state_offset", p.batch, matrix);
    p.output_offset = channel_parameter(output_offset, "output_offset", p.batch, {p.dim});
  }
  const Tensor out = torch::stable::new_empty(x, channels);
  p.out = out.data_ptr();
  check_launch("selective_state_update", selective_state_update(p, place.stream()));
  return out;
}

}  // namespace
}  // namespace ssmtune::cuda

SSMTUNE_CUDA_IMPL(m) { m.impl("selective_state_update", TORCH_BOX(&ssmtune::cuda::update)); }
