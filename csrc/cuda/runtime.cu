#include "cuda/runtime.h"

#include <cuda_runtime.h>

#include "cuda/selective_scan.h"

namespace ssmtune::cuda {
namespace {

__global__ void any_kernel() {}

}  // namespace

std::string error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

std::string why_not() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, any_kernel);
  cudaGetLastError();  // or the next launch would report it
  if (error != cudaSuccess) return error_text(error);
  int device = 0, bytes = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (bytes >= kMostSharedBytes) return "";
  return "a block has at most " + std::to_string(bytes >> 10) + " KiB of shared memory there, and the backward scan takes up to " +
         std::to_string(kMostSharedBytes >> 10);
}

}  // namespace ssmtune::cuda
