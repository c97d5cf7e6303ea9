// What the binding of the CUDA kernels (csrc/cuda) finds in the place of the CUDA runtime, and what tests ask of it.

#include <algorithm>

#include "cuda/causal_conv1d_device.h"
#include "cuda/runtime.h"
#include "cuda/selective_scan.h"
#include "cuda/selective_state_update.h"
#include "emulator.h"

namespace ssmtune::cuda {

std::string error_text(int error) {
  // 719: a kernel failed
  return error == 719 ? emulator::error() : "the launch was refused with error " + std::to_string(error);
}

template <typename Params>
void describe(const Params& p, int64_t* numbers) {
  const ScanLayout layout = scan_layout(p);
  for (const int64_t number : {layout.states, layout.lanes, layout.block_channels, layout.section_blocks, layout.channel_blocks,
                               layout.row_groups, layout.segments, layout.blocks(), workspace_floats(p)}) {
    *numbers++ = number;
  }
}

extern "C" {

void set_order(unsigned order) { emulator::set_order(order); }

// (states, lanes, block_channels, section_blocks, channel_blocks, row_groups, segments, blocks, workspace_floats) of a scan that
// finds all gradients.
void scan_layout(bool backward, int64_t batch, int64_t dim, int64_t seqlen, int64_t dstate, int64_t groups, int64_t rows,
                 int64_t* numbers) {
  SelectiveScanBackward p{};
  p.batch = batch, p.dim = dim, p.seqlen = seqlen, p.dstate = dstate, p.groups = groups, p.rows = rows;
  if (!backward) return describe(SelectiveScanForward{p, {}, nullptr}, numbers);
  float wanted;
  p.dB = p.dC = p.dA = p.dD = p.ddelta_bias = &wanted;
  p.dinitial_state = p.dstate_offset = p.doutput_offset = {&wanted, 0};
  describe(p, numbers);
}

// (vector, channels, steps, blocks, shares) of the tiles of a convolution, in dense memory.
void conv_tiles(bool backward, bool channels_last, int64_t batch, int64_t dim, int64_t seqlen, int64_t* tiles) {
  CausalConv1dBackward p{};
  p.batch = batch, p.dim = dim, p.seqlen = seqlen;
  alignas(16) static char memory;
  p.x = {&memory, DType::kBFloat16, channels_last, dim * seqlen, channels_last ? dim : seqlen};
  p.dout = p.dx = p.x;
  CausalConv1dForward forward{p, p.x, {}};
  const ConvTiles found = backward ? backward_tiles(p) : forward_tiles(forward);
  const int64_t values[] = {found.vector, found.channels, found.steps, found.blocks(), found.shares()};
  std::copy_n(values, 5, tiles);
}

int64_t conv_offset(bool channels_last, int64_t batch_stride, int64_t stride, int64_t batch, int64_t channel, int64_t step) {
  return offset(SequenceTensor{nullptr, DType::kFloat32, channels_last, batch_stride, stride}, batch, channel, step);
}

// (vector, lanes, block_channels, blocks) of a decoding step.
void update_layout(int64_t batch, int64_t dim, int64_t dstate, int64_t* layout) {
  SelectiveStateUpdate p{};
  p.batch = batch, p.dim = dim, p.dstate = dstate, p.groups = 1;
  p.B.stride = p.C.stride = dstate;
  const StateUpdateLayout found = ssmtune::cuda::layout(p);
  const int64_t values[] = {found.vector, found.lanes, found.block_channels, found.blocks()};
  std::copy_n(values, 4, layout);
}

}  // extern "C"

}  // namespace ssmtune::cuda
