// Memory of a kernel's own.
#pragma once

#include <cstdint>
#include <memory>
#include <new>

namespace ssmtune {

// Asks for huge pages under a large result: it is mostly memory the process has not touched yet, and to fetch that in pages
// of 4 KiB can take longer than the scan that fills it.
void prefer_huge_pages(void* data, int64_t bytes);

inline constexpr std::align_val_t kAlignment{64};
struct AlignedDelete {
  void operator()(float* p) const { ::operator delete[](p, kAlignment); }
};
using Buffer = std::unique_ptr<float[], AlignedDelete>;

Buffer allocate(int64_t count);

}  // namespace ssmtune
