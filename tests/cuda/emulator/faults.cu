// Kernels with and without the faults that the emulator is there to find.
#include <cuda_runtime.h>

namespace {

// The sum of the values of each block, through shared memory.
template <bool kBarrier>
__global__ void block_sum(const float* x, float* sums) {
  float* const shared = static_cast<float*>(emulator::shared_memory());
  shared[threadIdx.x] = x[blockIdx.x * blockDim.x + threadIdx.x];
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    if (kBarrier) __syncthreads();
    if (threadIdx.x < half) shared[threadIdx.x] += shared[threadIdx.x + half];
  }
  if (threadIdx.x == 0) sums[blockIdx.x] = shared[0];
}

// The sum of each warp's values in all of its lanes.
__global__ void warp_sum(const float* x, float* sums) {
  const unsigned i = blockIdx.x * blockDim.x + threadIdx.x;
  float sum = x[i];
  for (int bit = 16; bit > 0; bit /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, bit);
  sums[i] = sum;
}

__global__ void divergent_barrier(const float*, float* y) {
  if (threadIdx.x < 40) __syncthreads();
  y[threadIdx.x] = 1.0f;
}

__global__ void two_barriers(const float*, float* y) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  y[threadIdx.x] = 1.0f;
}

__global__ void divergent_shuffle(const float* x, float* y) {
  float value = x[threadIdx.x];
  if (threadIdx.x % 32 < 30) value = __shfl_xor_sync(0xffffffffu, value, 1);
  y[threadIdx.x] = value;
}

__global__ void shuffle_outside_its_mask(const float* x, float* y) {
  float value = x[threadIdx.x];
  if (threadIdx.x % 32 < 16) value = __shfl_sync(0x0000ffffu, value, 20);
  y[threadIdx.x] = value;
}

__global__ void missing_from_its_mask(const float* x, float* y) {
  y[threadIdx.x] = __shfl_sync(0x0000ffffu, x[threadIdx.x], 0);
}

__global__ void reads_unwritten_shared_memory(const float*, float* y) {
  y[threadIdx.x] = static_cast<float*>(emulator::shared_memory())[threadIdx.x];
}

__global__ void leaves_a_hole(const float* x, float* y) {
  if (threadIdx.x != 7) y[threadIdx.x] = x[threadIdx.x];
}

__global__ void writes_past_shared_memory(const float* x, float* y) {
  float* const shared = static_cast<float*>(emulator::shared_memory());
  shared[threadIdx.x + 1] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = shared[threadIdx.x];
}

__global__ void reads_past_an_input(const float* x, float* y) { y[threadIdx.x] = x[threadIdx.x + 1]; }

struct Kernel {
  const char* name;
  void (*kernel)(const float*, float*);
};
constexpr Kernel kKernels[] = {
    {"block_sum", block_sum<true>},
    {"dropped_barrier", block_sum<false>},
    {"warp_sum", warp_sum},
    {"divergent_barrier", divergent_barrier},
    {"two_barriers", two_barriers},
    {"divergent_shuffle", divergent_shuffle},
    {"shuffle_outside_its_mask", shuffle_outside_its_mask},
    {"missing_from_its_mask", missing_from_its_mask},
    {"reads_unwritten_shared_memory", reads_unwritten_shared_memory},
    {"leaves_a_hole", leaves_a_hole},
    {"writes_past_shared_memory", writes_past_shared_memory},
    {"reads_past_an_input", reads_past_an_input},
};

}  // namespace

// Runs a kernel on `blocks` blocks of 64 threads, with one float of shared memory for each thread unless more are asked for.
extern "C" const char* run_kernel(const char* name, unsigned order, unsigned blocks, unsigned shared_floats, const float* x,
                                  float* y) {
  emulator::set_order(order);
  for (const Kernel& kernel : kKernels) {
    if (std::strcmp(kernel.name, name) != 0) continue;
    cudaLaunchConfig_t config{};
    config.gridDim.x = blocks;
    config.blockDim.x = 64;
    config.dynamicSmemBytes = shared_floats * sizeof(float);
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel.kernel, x, y);
    if (error == cudaErrorLaunchFailure) return emulator::error();
    return error == cudaSuccess ? "" : "invalid value";
  }
  return "no such kernel";
}
