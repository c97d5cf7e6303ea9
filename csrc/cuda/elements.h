// Elements of tensors that kernels of any dtype load and store.
#pragma once

#include <cstdint>

#include "cpu/params.h"
#include "cuda/device.h"

namespace ssmtune::cuda {

// Neighbours in memory that are loaded and stored at once.
template <typename T, int kCount>
struct alignas(kCount * sizeof(T)) Vector {
  T data[kCount];

  __device__ __forceinline__ float operator[](int i) const { return to_float(data[i]); }
  __device__ __forceinline__ void set(int i, float x) { data[i] = from_float<T>(x); }
};

template <int kCount, typename T>
__device__ __forceinline__ Vector<T, kCount> load_vector(const T* from) {
  return *reinterpret_cast<const Vector<T, kCount>*>(from);
}
template <int kCount, typename T>
__device__ __forceinline__ void store_vector(T* to, const Vector<T, kCount>& x) {
  *reinterpret_cast<Vector<T, kCount>*>(to) = x;
}

// Calls function(T{}) with the type of a dtype.
template <typename Function>
auto dispatch(DType dtype, const Function& function) {
  switch (dtype) {
    case DType::kFloat32: return function(float{});
    case DType::kBFloat16: return function(BFloat16{});
    default: return function(Float16{});
  }
}

}  // namespace ssmtune::cuda
