#include "cpu/dispatch.h"
#include "cpu/vec.h"

namespace ssmtune::SSMTUNE_CPU_CAPABILITY {

void causal_conv1d_update(const CausalConv1dUpdate& p, int64_t row, int64_t begin, int64_t end);

namespace {

template <typename T>
SSMTUNE_INLINE Vec gather(const T* p, int64_t stride, int64_t lanes) {
  if (stride == 1) return load_first(p, lanes);
  T buffer[kLanes];
  if (lanes == kLanes) {
    SSMTUNE_UNROLL
    for (int i = 0; i < kLanes; ++i) buffer[i] = p[i * stride];
  } else {
    for (int i = 0; i < kLanes; ++i) buffer[i] = i < lanes ? p[i * stride] : T{};
  }
  return load(buffer);
}

template <typename T>
SSMTUNE_INLINE void scatter(T* p, int64_t stride, Vec x, int64_t lanes) {
  if (stride == 1) return store_first(p, x, lanes);
  T buffer[kLanes];
  store(buffer, x);
  if (lanes == kLanes) {
    SSMTUNE_UNROLL
    for (int i = 0; i < kLanes; ++i) p[i * stride] = buffer[i];
  } else {
    for (int i = 0; i < lanes; ++i) p[i * stride] = buffer[i];
  }
}

// Neighbouring channels of a tensor that has them along `axis`; `offset` is that of the first.
Vec read(const StridedTensor& x, int64_t offset, int axis, int64_t lanes) {
  switch (x.dtype) {
    case DType::kFloat32: return gather(static_cast<const float*>(x.data) + offset, x.strides[axis], lanes);
    case DType::kBFloat16: return gather(static_cast<const BFloat16*>(x.data) + offset, x.strides[axis], lanes);
    case DType::kFloat16: return gather(static_cast<const Float16*>(x.data) + offset, x.strides[axis], lanes);
  }
  return Vec{};
}

void write(const StridedTensor& x, int64_t offset, int axis, Vec value, int64_t lanes) {
  switch (x.dtype) {
    case DType::kFloat32: return scatter(static_cast<float*>(x.data) + offset, x.strides[axis], value, lanes);
    case DType::kBFloat16: return scatter(static_cast<BFloat16*>(x.data) + offset, x.strides[axis], value, lanes);
    case DType::kFloat16: return scatter(static_cast<Float16*>(x.data) + offset, x.strides[axis], value, lanes);
  }
}

}  // namespace

void causal_conv1d_update(const CausalConv1dUpdate& p, int64_t row, int64_t begin, int64_t end) {
  const int64_t context = p.width - 1;
  for (int64_t channel = begin; channel < end; channel += kLanes) {
    const int64_t lanes = end - channel < kLanes ? end - channel : kLanes;
    const int64_t weight = channel * p.weight.strides[0], state = row * p.state.strides[0] + channel * p.state.strides[1];
    Vec y = p.bias.data ? read(p.bias, channel * p.bias.strides[0], 0, lanes) : Vec{};
    for (int64_t k = 0; k < context; ++k) {
      const Vec x = read(p.state, state + k * p.state.strides[2], 1, lanes);
      if (k > 0) write(p.state, state + (k - 1) * p.state.strides[2], 1, x, lanes);
      y += read(p.weight, weight + k * p.weight.strides[1], 0, lanes) * x;
    }
    const Vec x = read(p.x, row * p.x.strides[0] + channel * p.x.strides[1], 1, lanes);
    if (context > 0) write(p.state, state + (context - 1) * p.state.strides[2], 1, x, lanes);
    y += read(p.weight, weight + context * p.weight.strides[1], 0, lanes) * x;
    if (p.silu) y = silu(y);
    write(p.out, row * p.out.strides[0] + channel * p.out.strides[1], 1, y, lanes);
  }
}

}  // namespace ssmtune::SSMTUNE_CPU_CAPABILITY
