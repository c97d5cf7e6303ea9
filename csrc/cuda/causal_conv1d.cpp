#include <algorithm>
#include <cstdint>
#include <initializer_list>

#include "cuda/causal_conv1d.h"

namespace ssmtune::cuda {
namespace {

// Whether the channels of each step lie next to each other, in groups of kConvVector that are aligned to their size.
bool holds_vectors(const SequenceTensor& x, int64_t dim) {
  const uintptr_t bytes = kConvVector * (x.dtype == DType::kFloat32 ? 4 : 2);
  return x.channels_last && dim % kConvVector == 0 && x.stride % kConvVector == 0 && x.batch_stride % kConvVector == 0 &&
         reinterpret_cast<uintptr_t>(x.data) % bytes == 0;
}

ConvTiles cut(const CausalConv1dParams& p, std::initializer_list<const SequenceTensor*> tensors, int steps, int round) {
  ConvTiles tiles{kConvVector, 0, 0, 0, 0, p.batch};
  for (const SequenceTensor* x : tensors) {
    if (!x->data) continue;
    if (!holds_vectors(*x, p.dim)) tiles.vector = std::min(tiles.vector, 1);
    if (!x->channels_last) tiles.vector = 0;
  }
  tiles.channels = tiles.vector ? kWarp * tiles.vector : kConvWarps;
  tiles.steps = tiles.vector ? kConvWarps * steps : kConvRounds * round;
  tiles.channel_tiles = ceil_div(p.dim, tiles.channels);
  tiles.step_tiles = ceil_div(p.seqlen, tiles.steps);
  return tiles;
}

}  // namespace

ConvTiles forward_tiles(const CausalConv1dForward& p) { return cut(p, {&p.x, &p.out}, kForwardSteps, kWarp); }

ConvTiles backward_tiles(const CausalConv1dBackward& p) {
  return cut(p, {&p.x, &p.dout, &p.dx}, kBackwardSteps, kBackwardRound);
}

}  // namespace ssmtune::cuda
