#include "cuda/binding.h"

#if !defined(SSMTUNE_EMULATED)
#include <dlfcn.h>
#endif

#include "cuda/runtime.h"

namespace ssmtune::cuda {

#if defined(SSMTUNE_EMULATED)
Place::Place(int32_t) {}
#else
namespace {

// aoti_torch_get_current_cuda_stream is in libtorch_cuda, which whoever has tensors on a GPU has loaded. Looked up, not linked,
// so that a torch without CUDA is enough to build this library, and to load it.
void* current_stream(int32_t device) {
  static const auto get = [] {
    void* const torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<int32_t (*)(int32_t, void**)>(
        dlsym(torch_cuda ? torch_cuda : RTLD_DEFAULT, "aoti_torch_get_current_cuda_stream"));
  }();
  void* stream = nullptr;
  STD_TORCH_CHECK(get != nullptr && get(device, &stream) == 0, "torch does not name its current CUDA stream");
  return stream;
}

}  // namespace

Place::Place(int32_t device) : guard_(device), stream_(current_stream(device)) {}
#endif

void Place::check(const Tensor& main, const Tensor& other) {
  STD_TORCH_CHECK(other.is_cuda() == main.is_cuda() && other.get_device_index() == main.get_device_index(),
                  "all tensors must be on one device");
}

void check_launch(const char* op, int error) { STD_TORCH_CHECK(error == 0, op, ": ", error_text(error)); }

PackedSequences::PackedSequences(const char* op, const OptionalTensor& cu_seqlens, int64_t batch) : rows(batch) {
  if (!cu_seqlens) return;
  STD_TORCH_CHECK(cu_seqlens->scalar_type() == ScalarType::Int || cu_seqlens->scalar_type() == ScalarType::Long, op,
                  ": cu_seqlens must be int32 or int64");
  STD_TORCH_CHECK(cu_seqlens->dim() == 1 && cu_seqlens->size(0) >= 2 && batch == 1, op,
                  ": cu_seqlens must have shape (n_sequences + 1,), and the batch must be 1");
  rows = cu_seqlens->size(0) - 1;
  tensor = torch::stable::contiguous(torch::stable::to(*cu_seqlens, ScalarType::Long));
}

}  // namespace ssmtune::cuda
