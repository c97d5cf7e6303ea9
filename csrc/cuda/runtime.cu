#include "cuda/runtime.h"

#include <cuda_runtime.h>

namespace ssmtune::cuda {
namespace {

__global__ void any_kernel() {}

}  // namespace

std::string error_text(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

std::string why_not() {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, any_kernel);
  cudaGetLastError();  // or the next launch would report it
  return error == cudaSuccess ? "" : error_text(error);
}

}  // namespace ssmtune::cuda
