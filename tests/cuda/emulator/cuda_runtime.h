// What the kernels use of CUDA, on top of emulator.h; found in the place of CUDA's own header.
#pragma once

#include <bit>
#include <cmath>
#include <cstring>
#include <map>

#include "emulator.h"

#define SSMTUNE_EMULATED 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __restrict__
#define __grid_constant__
#define __align__(n) alignas(n)
// one block runs at a time; unlike the memory of the launch, such variables are not NaN before each
#define __shared__ static

struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

inline void __syncthreads(std::source_location where = std::source_location::current()) { emulator::barrier(where); }
inline void __syncwarp(uint32_t mask = 0xffffffffu, std::source_location where = std::source_location::current()) {
  emulator::exchange(mask, 0, emulator::lane(), where);
}

namespace emulator {
template <typename T>
T shuffle(uint32_t mask, T value, unsigned source_lane, std::source_location where) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  bits = exchange(mask, bits, source_lane, where);
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}
}  // namespace emulator

// Lanes shuffle within groups of `width`; a source outside the group is the lane itself.
template <typename T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32, std::source_location where = std::source_location::current()) {
  const unsigned lane = emulator::lane();
  return emulator::shuffle(mask, value, (lane & ~(width - 1)) + (source & (width - 1)), where);
}
template <typename T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32, std::source_location where = std::source_location::current()) {
  const unsigned lane = emulator::lane(), source = lane ^ bits;
  return emulator::shuffle(mask, value, source / width <= lane / width ? source : lane, where);
}
template <typename T>
T __shfl_up_sync(uint32_t mask, T value, unsigned by, int width = 32, std::source_location where = std::source_location::current()) {
  const unsigned lane = emulator::lane();
  return emulator::shuffle(mask, value, lane % width >= by ? lane - by : lane, where);
}
template <typename T>
T __shfl_down_sync(uint32_t mask, T value, unsigned by, int width = 32, std::source_location where = std::source_location::current()) {
  const unsigned lane = emulator::lane();
  return emulator::shuffle(mask, value, lane % width + by < static_cast<unsigned>(width) ? lane + by : lane, where);
}
inline uint32_t __ballot_sync(uint32_t mask, bool predicate, std::source_location where = std::source_location::current()) {
  return emulator::ballot(mask, predicate, where);
}
inline bool __any_sync(uint32_t mask, bool predicate, std::source_location where = std::source_location::current()) {
  return emulator::ballot(mask, predicate, where) != 0;
}

template <typename T>
T min(T x, T y) {
  return y < x ? y : x;
}
template <typename T>
T max(T x, T y) {
  return x < y ? y : x;
}

template <typename T>
T __ldg(const T* p) {
  return *p;
}
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __frcp_rn(float x) { return 1.0f / x; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }

enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
using cudaStream_t = void*;
struct cudaLaunchAttribute;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

namespace emulator {
// The most a block of compute capability 8.0 may have, and what it has without asking.
inline constexpr size_t kMostSharedBytes = 163 << 10, kSharedBytes = 48 << 10;
inline std::map<const void*, size_t>& shared_bytes_allowed() {
  static std::map<const void*, size_t> allowed;
  return allowed;
}
}  // namespace emulator

template <typename... Parameters>
cudaError_t cudaFuncSetAttribute(void (*kernel)(Parameters...), cudaFuncAttribute, int value) {
  if (value < 0 || static_cast<size_t>(value) > emulator::kMostSharedBytes) return cudaErrorInvalidValue;
  emulator::shared_bytes_allowed()[reinterpret_cast<const void*>(kernel)] = value;
  return cudaSuccess;
}

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
  const auto allowed = emulator::shared_bytes_allowed().find(reinterpret_cast<const void*>(kernel));
  const size_t limit = allowed == emulator::shared_bytes_allowed().end() ? 0 : allowed->second;
  if (config->dynamicSmemBytes > (limit > emulator::kSharedBytes ? limit : emulator::kSharedBytes)) return cudaErrorInvalidValue;
  const auto run = [&] { kernel(arguments...); };
  return emulator::launch(config->gridDim, config->blockDim, config->dynamicSmemBytes, run) ? cudaSuccess : cudaErrorLaunchFailure;
}
