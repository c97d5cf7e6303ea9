#include "tensors.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <string>

#include "cpu/buffer.h"

namespace ssmtune {
namespace {

std::string to_string(const int64_t* sizes, int64_t count) {
  std::string text = "(";
  for (int64_t i = 0; i < count; ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + ")";
}

}  // namespace

void check_shape(const Tensor& x, const char* name, const Shape& shape) {
  const int64_t dims = x.dim();
  bool same = dims == static_cast<int64_t>(shape.size());
  for (int64_t i = 0; same && i < dims; ++i) same = x.size(i) == shape[i];
  STD_TORCH_CHECK(same, name, " has shape ", to_string(x.sizes().data(), dims), ", expected ",
                  to_string(shape.data(), static_cast<int64_t>(shape.size())));
}

void check_sizes(std::initializer_list<int64_t> sizes) {
  for (const int64_t size : sizes) STD_TORCH_CHECK(size >= 1, "a dimension is empty");
}

void check_not_expanded(const Tensor& x, const char* name) {
  for (int64_t axis = 0; axis < x.dim(); ++axis) {
    STD_TORCH_CHECK(x.size(axis) <= 1 || x.stride(axis) != 0, name, " is expanded");
  }
}

DType dtype_of(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    default: STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16");
  }
}

SequenceTensor sequence(const Tensor& x, const char* name, const Shape& shape, DType dtype) {
  check_shape(x, name, shape);
  STD_TORCH_CHECK(dtype_of(x, name) == dtype, name, " must have the dtype of the input");
  const bool channels_adjacent = x.stride(1) == 1 || shape[1] == 1, steps_adjacent = x.stride(2) == 1 || shape[2] == 1;
  STD_TORCH_CHECK(channels_adjacent || steps_adjacent, name, " must have stride 1 along its channels or its steps, got strides ",
                  to_string(x.strides().data(), 3));
  const bool channels_last = x.stride(1) == 1 || (channels_adjacent && x.stride(2) != 1);
  return {x.data_ptr(), dtype, channels_last, x.stride(0), channels_last ? x.stride(2) : x.stride(1)};
}
SequenceTensor sequence(const OptionalTensor& x, const char* name, const Shape& shape, DType dtype) {
  return x ? sequence(*x, name, shape, dtype) : SequenceTensor{};
}

SequenceTensor result(const OptionalTensor& x, const char* name, const Shape& shape, DType dtype) {
  const SequenceTensor tensor = sequence(x, name, shape, dtype);
  if (x) {
    const int64_t rows = shape[tensor.channels_last ? 2 : 1];
    const int64_t extent = (shape[0] - 1) * tensor.batch_stride + rows * tensor.stride;
    prefer_huge_pages(tensor.data, extent * (dtype == DType::kFloat32 ? 4 : 2));
  }
  return tensor;
}

StateTensor states(const Tensor& x, const char* name, Shape shape, int64_t groups, DType dtype) {
  StateTensor tensor;
  if (x.dim() == 4) {
    shape.insert(shape.begin() + 1, groups);
    check_shape(x, name, shape);
    const Tensor first = torch::stable::select(x, 1, 0);
    static_cast<SequenceTensor&>(tensor) = sequence(first, name, {shape[0], shape[2], shape[3]}, dtype);
    tensor.group_stride = x.stride(1);
  } else {
    static_cast<SequenceTensor&>(tensor) = sequence(x, name, shape, dtype);
  }
  return tensor;
}

std::vector<int64_t> sequence_bounds(const char* op, const OptionalTensor& cu_seqlens, int64_t batch, int64_t seqlen) {
  if (!cu_seqlens) return {};
  const bool wide = cu_seqlens->scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(wide || cu_seqlens->scalar_type() == ScalarType::Int, op, ": cu_seqlens must be int32 or int64");
  STD_TORCH_CHECK(cu_seqlens->is_cpu() && cu_seqlens->dim() == 1 && cu_seqlens->size(0) >= 2 && batch == 1, op,
                  ": cu_seqlens must have shape (n_sequences + 1,) and lie on the CPU, and the batch must be 1");
  const int64_t stride = cu_seqlens->stride(0);
  std::vector<int64_t> bounds(cu_seqlens->size(0));
  for (size_t i = 0; i < bounds.size(); ++i) {
    bounds[i] = wide ? static_cast<const int64_t*>(cu_seqlens->data_ptr())[i * stride]
                     : static_cast<const int32_t*>(cu_seqlens->data_ptr())[i * stride];
    const bool in_order = i == 0 ? bounds[i] == 0 : bounds[i] > bounds[i - 1];
    STD_TORCH_CHECK(in_order && (i + 1 < bounds.size() || bounds[i] == seqlen), op, ": cu_seqlens has ", bounds[i],
                    " as value ", i, ", but must start with 0, increase, and end with seqlen = ", seqlen,
                    ".\n  Each step belongs to a sequence, none is empty. Pass 0, then the cumulative sum of the lengths.");
  }
  return bounds;
}

float* contiguous(const Tensor& x, const char* name, const Shape& shape) {
  check_shape(x, name, shape);
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.is_contiguous(), name, " must be float32 and contiguous");
  return static_cast<float*>(x.data_ptr());
}
float* contiguous(const OptionalTensor& x, const char* name, const Shape& shape) {
  return x ? contiguous(*x, name, shape) : nullptr;
}

ChannelParameter channel_parameter(const OptionalTensor& x, const char* name, int64_t batch, Shape shape) {
  if (!x) return {};
  int64_t row = 1;
  for (const int64_t size : shape) row *= size;
  const bool shared = x->dim() == static_cast<int64_t>(shape.size());
  if (!shared) shape.insert(shape.begin(), batch);
  return {contiguous(*x, name, shape), shared ? 0 : row};
}

StridedTensor strided(const Tensor& x, const char* name, const Shape& shape) {
  check_shape(x, name, shape);
  StridedTensor tensor{x.data_ptr(), dtype_of(x, name), {}};
  for (size_t axis = 0; axis < shape.size(); ++axis) tensor.strides[axis] = x.stride(axis);
  return tensor;
}

}  // namespace ssmtune
