#include "cpu/buffer.h"

#include <algorithm>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace ssmtune {

void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHugePage * kHugePage;
  // a hint: where it fails, nothing is lost
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

Buffer allocate(int64_t count) {
  Buffer buffer(static_cast<float*>(::operator new[](std::max<int64_t>(count, 1) * sizeof(float), kAlignment)));
  prefer_huge_pages(buffer.get(), count * sizeof(float));
  return buffer;
}

}  // namespace ssmtune
