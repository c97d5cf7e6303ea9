// What the kernels build on: dtypes, fast functions, shared memory and launches, under nvcc or on the CPU (tests/cuda/emulator).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <type_traits>

// With this the kernels compiled by nvcc use nothing that C++ does not have as well.
#if !defined(__CUDA_ARCH__)
#define SSMTUNE_PLAIN_DEVICE_CODE
#endif

namespace ssmtune::cuda {

inline constexpr float kLog2e = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;
inline constexpr unsigned kAllLanes = 0xffffffffu;

using BFloat16 = __nv_bfloat16;
using Float16 = __half;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(BFloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_float(Float16 x) { return __half2float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x) {
  if constexpr (sizeof(T) == sizeof(float)) {
    return x;
  } else if constexpr (std::is_same_v<T, BFloat16>) {
    return __float2bfloat16_rn(x);
  } else {
    return __float2half_rn(x);
  }
}

// One instruction each; results below the smallest normal number are zero.
__device__ __forceinline__ float exp2_fast(float x) {
#ifdef SSMTUNE_PLAIN_DEVICE_CODE
  return exp2f(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}
__device__ __forceinline__ float reciprocal_fast(float x) {
#ifdef SSMTUNE_PLAIN_DEVICE_CODE
  return 1.0f / x;
#else
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#endif
}

__device__ __forceinline__ float sigmoid(float x) { return reciprocal_fast(1.0f + exp2_fast(x * -kLog2e)); }

// softplus(x) = max(x, 0) + log(1 + e) with e = exp(-|x|); log(1 + e) / e as the polynomial nearest to it on [0, 1], for a
// logarithm of 1 + e would lose the small steps that matter most.
__device__ __forceinline__ float softplus(float x) {
  const float e = exp2_fast(fabsf(x) * -kLog2e);
  float p = 0.005384058691561222f;
  p = fmaf(p, e, -0.030110951513051987f);
  p = fmaf(p, e, 0.07921071350574493f);
  p = fmaf(p, e, -0.1374662071466446f);
  p = fmaf(p, e, 0.19145114719867706f);
  p = fmaf(p, e, -0.24852944910526276f);
  p = fmaf(p, e, 0.33320343494415283f);
  p = fmaf(p, e, -0.49999552965164185f);
  p = fmaf(p, e, 1.0f);
  return fmaf(p, e, fmaxf(x, 0.0f));
}

// The memory that the threads of a block share: one struct, whose size its launch asked for.
template <typename T>
__device__ __forceinline__ T& shared_memory() {
#ifdef SSMTUNE_EMULATED
  return *static_cast<T*>(emulator::shared_memory());
#else
  extern __shared__ __align__(16) unsigned char bytes[];
  return *reinterpret_cast<T*>(bytes);
#endif
}

// The same number, hidden from the compiler: what is computed from it in a loop is not computed before the loop, and takes no
// registers from all else that the loop does.
__device__ __forceinline__ uint32_t hidden(uint32_t x) {
#ifndef SSMTUNE_PLAIN_DEVICE_CODE
  asm volatile("" : "+r"(x));
#endif
  return x;
}

// Starts `blocks` blocks of threads in one row.
template <typename... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), int64_t blocks, int threads, size_t shared_bytes, void* stream,
                   const Parameters&... arguments) {
  if (blocks < 1 || blocks > 0x7fffffff) return cudaErrorInvalidValue;
  if (shared_bytes > 48 << 10) {
    const auto bytes = static_cast<int>(shared_bytes);
    const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config{};
  config.gridDim.x = static_cast<unsigned>(blocks);
  config.gridDim.y = config.gridDim.z = 1;
  config.blockDim.x = static_cast<unsigned>(threads);
  config.blockDim.y = config.blockDim.z = 1;
  config.dynamicSmemBytes = shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace ssmtune::cuda
