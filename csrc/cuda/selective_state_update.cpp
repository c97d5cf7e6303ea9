#include <algorithm>
#include <bit>
#include <cstdint>

#include "cuda/selective_state_update.h"

namespace ssmtune::cuda {
namespace {

constexpr int kVector = 4, kWarp = 32;

bool is_aligned(const void* data, int64_t stride, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(data) % (kVector * bytes) == 0 && stride % kVector == 0;
}

}  // namespace

StateUpdateLayout layout(const SelectiveStateUpdate& p) {
  const int64_t bytes = p.dtype == DType::kFloat32 ? 4 : 2;
  bool aligned = is_aligned(p.state, p.dstate, 4) && is_aligned(p.A, p.dstate, 4) &&
                 is_aligned(p.state_offset.data, p.state_offset.batch_stride, 4);
  for (const Rows* x : {&p.B, &p.C}) aligned &= is_aligned(x->data, x->stride, bytes) && x->group_stride % kVector == 0;

  StateUpdateLayout layout{};
  layout.vector = aligned ? kVector : 1;
  const auto vectors = static_cast<uint64_t>((p.dstate + layout.vector - 1) / layout.vector);
  layout.lanes = static_cast<int>(std::min<uint64_t>(kWarp, std::bit_ceil(vectors)));
  layout.block_channels = StateUpdateLayout::kThreads / layout.lanes;
  layout.channel_blocks = static_cast<unsigned>((p.dim + layout.block_channels - 1) / layout.block_channels);
  layout.group_channels = static_cast<unsigned>(p.dim / p.groups);
  layout.batch = p.batch;
  return layout;
}

}  // namespace ssmtune::cuda
