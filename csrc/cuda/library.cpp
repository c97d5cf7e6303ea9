// The operators that only this library has; the others are those of csrc/library.cpp, for tensors on a GPU.

#include <torch/csrc/stable/library.h>

#include <string>

#include "cuda/runtime.h"

namespace ssmtune::cuda {
namespace {

std::string architectures() { return SSMTUNE_CUDA_ARCHS; }

}  // namespace
}  // namespace ssmtune::cuda

STABLE_TORCH_LIBRARY_FRAGMENT(ssmtune_native, m) {
  m.def("cuda_architectures() -> str");
  m.def("cuda_why_not() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(ssmtune_native, CompositeExplicitAutograd, m) {
  m.impl("cuda_architectures", TORCH_BOX(&ssmtune::cuda::architectures));
  m.impl("cuda_why_not", TORCH_BOX(&ssmtune::cuda::why_not));
}
