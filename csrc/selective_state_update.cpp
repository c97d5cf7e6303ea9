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
  // B or C: (batch, states), or (batch, groups, states).
  const void* states(const Tensor& x, const char* name, Shape shape, int64_t groups, ScalarType dtype) {
    if (x.dim() == 3) shape.insert(shape.begin() + 1, groups);
    return get(x, name, shape, dtype);
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

// A parameter of `shape` for each adapter, read where it lies: a copy would be one of all of them.
ChannelParameter adapter_stack(const OptionalTensor& x, const char* name, int64_t adapters, Shape shape) {
  if (!x) return {};
  shape.insert(shape.begin(), adapters);
  check_shape(*x, name, shape);
  STD_TORCH_CHECK(x->scalar_type() == ScalarType::Float && torch::stable::select(*x, 0, 0).is_contiguous(), name,
                  " must be float32, and its entries contiguous");
  return {static_cast<const float*>(x->data_ptr()), x->stride(0)};
}

// The entry of the stacks that each row reads, or -1.
std::vector<int64_t> adapter_of_rows(const Tensor& index, int64_t batch, int64_t adapters) {
  check_shape(index, "adapter_index", {batch});
  const bool wide = index.scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(wide || index.scalar_type() == ScalarType::Int, "adapter_index must be int32 or int64");
  const void* const data = index.data_ptr();
  const int64_t stride = index.stride(0);
  std::vector<int64_t> rows(batch);
  for (int64_t row = 0; row < batch; ++row) {
    rows[row] = wide ? static_cast<const int64_t*>(data)[row * stride] : static_cast<const int32_t*>(data)[row * stride];
    STD_TORCH_CHECK(rows[row] >= -1 && rows[row] < adapters, "adapter_index has ", rows[row], " for row ", row,
                    ", expected -1 to ", adapters - 1);
  }
  return rows;
}

Tensor selective_state_update(const Tensor& state, const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B,
                              const Tensor& C, const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& dt_bias,
                              bool dt_softplus, const OptionalTensor& state_offset, const OptionalTensor& output_offset,
                              const OptionalTensor& adapter_index) {
  STD_TORCH_CHECK(state.dim() == 3, "state must have shape (batch, dim, dstate)");
  SelectiveStateUpdate p{};
  p.batch = state.size(0), p.dim = state.size(1), p.dstate = state.size(2);
  check_sizes({p.batch, p.dim, p.dstate});
  p.dtype = dtype_of(x, "x");
  const Shape channel_shape{p.batch, p.dim}, state_shape{p.batch, p.dstate};
  const Shape matrix_shape{p.dim, p.dstate}, full_shape{p.batch, p.dim, p.dstate};
  p.groups = B.dim() == 3 ? B.size(1) : 1;
  STD_TORCH_CHECK(p.groups >= 1 && p.dim % p.groups == 0 && B.dim() == C.dim(), "B and C must share groups that divide dim");
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
  p.B = memory.states(B, "B", state_shape, p.groups, dtype);
  p.C = memory.states(C, "C", state_shape, p.groups, dtype);
  check_shape(A, "A", matrix_shape);
  p.one_decay = A.stride(1) == 0;
  p.A = p.one_decay ? memory.get(torch::stable::select(A, 1, 0), "A", {p.dim}) : memory.get(A, "A", matrix_shape);
  p.D = memory.get(D, "D", {p.dim});
  p.dt_bias = memory.get(dt_bias, "dt_bias", {p.dim});
  p.dt_softplus = dt_softplus;
  std::vector<int64_t> adapter_of_row;
  if (adapter_index) {
    STD_TORCH_CHECK(state_offset || output_offset, "adapter_index was given without offsets");
    const int64_t adapters = (state_offset ? state_offset : output_offset)->size(0);
    check_sizes({adapters});
    p.state_offset = adapter_stack(state_offset, "state_offset", adapters, matrix_shape);
    p.output_offset = adapter_stack(output_offset, "output_offset", adapters, {p.dim});
    adapter_of_row = adapter_of_rows(*adapter_index, p.batch, adapters);
    p.adapter_of_row = adapter_of_row.data();
  } else {
    p.state_offset = memory.channel_parameter(state_offset, "state_offset", p.batch, matrix_shape);
    p.output_offset = memory.channel_parameter(output_offset, "output_offset", p.batch, {p.dim});
  }
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
