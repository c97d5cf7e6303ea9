// The launch arithmetic of the selective scan, and the choice of a kernel.
#include "cuda/selective_scan.h"

#include <algorithm>

#include "cuda/selective_scan_launch.h"

namespace ssmtune::cuda {
namespace {

int64_t ceil_div(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

// Blocks that keep a large GPU busy; with fewer, rows are cut in segments of at least so many chunks. The first pass over the
// segments costs half a scan: two of them would gain little.
constexpr int64_t kManyBlocks = 512, kManyBackwardBlocks = 256, kLeastChunks = 2, kLeastSegments = 3, kMostSegments = 64;

// Groups of rows whose shares of a gradient are kept apart until the end.
constexpr int64_t kMostRowGroups = 64;

ScanLayout make_layout(const SelectiveScanParams& p, int64_t states, int64_t lanes, int64_t most_lanes) {
  ScanLayout layout{};
  layout.states = states;
  layout.lanes = lanes;
  while (layout.padded_states() < p.dstate && layout.lanes < most_lanes) layout.lanes *= 2;
  while (layout.padded_states() < p.dstate) layout.states *= 2;
  const int64_t threads = lanes == 1 ? kScanThreads : backward_threads(layout.states);
  layout.block_channels = threads / layout.lanes;
  layout.section_channels = p.dim / p.groups;
  layout.section_blocks = ceil_div(layout.section_channels, layout.block_channels);
  layout.channel_blocks = p.groups * layout.section_blocks;
  layout.row_groups = p.rows;
  layout.segments = 1;
  return layout;
}

int64_t choose_segments(const SelectiveScanParams& p, const ScanLayout& layout, int64_t many_blocks) {
  const int64_t chunks = ceil_div(p.batch * p.seqlen / p.rows, kChunk);
  const int64_t segments = std::min({many_blocks / layout.blocks(), chunks / kLeastChunks, kMostSegments});
  return segments < kLeastSegments ? 1 : segments;
}

ScanLayout forward_layout(const SelectiveScanParams& p) { return make_layout(p, 16, 1, 16); }

int64_t segment_floats(const SelectiveScanParams& p, const ScanLayout& layout) {
  return layout.segments > 1 ? p.rows * layout.segments * p.dim * (p.dstate + 1) : 0;
}

// Hands out the floats of a workspace; without one, only counts them.
class Arena {
 public:
  explicit Arena(float* data) : data_(data) {}
  float* take(int64_t floats) {
    float* const taken = data_ ? data_ + used_ : nullptr;
    used_ += ceil_div(floats, 4) * 4;
    return taken;
  }
  int64_t used() const { return used_; }

 private:
  float* data_;
  int64_t used_ = 0;
};

// `parts`: the shares of a gradient that all rows share; `segments`: of one that has a row for each.
GradientShares make_shares(Arena& arena, const ParameterGradient& gradient, int64_t size, int64_t rows, int64_t parts,
                           int64_t segments) {
  if (!gradient.data) return {};
  const bool shared = gradient.batch_stride == 0;
  GradientShares shares{gradient.data, gradient.data, shared ? size : rows * size, shared ? parts : segments,
                        gradient.batch_stride};
  if (shares.count > 1) shares.data = arena.take(shares.count * shares.size);
  return shares;
}

}  // namespace

ScanLayout scan_layout(const SelectiveScanForward& p) {
  ScanLayout layout = forward_layout(p);
  layout.segments = choose_segments(p, layout, kManyBlocks);
  return layout;
}

ScanLayout scan_layout(const SelectiveScanBackward& p) {
  ScanLayout layout = make_layout(p, 4, 4, 32);
  layout.row_groups = std::min(p.rows, kMostRowGroups);
  layout.segments = choose_segments(p, layout, kManyBackwardBlocks);
  return layout;
}

ScanLayout segment_layout(const SelectiveScanBackward& p) {
  ScanLayout layout = forward_layout(p);
  layout.segments = scan_layout(p).segments;
  return layout;
}

BackwardWorkspace backward_workspace(const SelectiveScanBackward& p, const ScanLayout& layout) {
  Arena arena(p.workspace);
  BackwardWorkspace w{};
  w.segments = arena.take(segment_floats(p, layout));
  if (p.dB || p.dC) w.dBC = arena.take(p.batch * layout.channel_blocks * p.seqlen * 2 * layout.padded_states());
  const int64_t groups = layout.row_groups, parts = groups * layout.segments, matrix = p.dim * p.dstate;
  w.dA = make_shares(arena, {p.dA}, matrix, p.rows, parts, layout.segments);
  w.dD = make_shares(arena, {p.dD}, p.dim, p.rows, parts, layout.segments);
  w.ddelta_bias = make_shares(arena, {p.ddelta_bias}, p.dim, p.rows, parts, layout.segments);
  // the first segment alone has one
  w.dinitial_state = make_shares(arena, p.dinitial_state, matrix, p.rows, groups, 1);
  w.dstate_offset = make_shares(arena, p.dstate_offset, matrix, p.rows, parts, layout.segments);
  w.doutput_offset = make_shares(arena, p.doutput_offset, p.dim, p.rows, parts, layout.segments);
  w.floats = arena.used();
  return w;
}

int64_t workspace_floats(const SelectiveScanForward& p) { return segment_floats(p, scan_layout(p)); }

int64_t workspace_floats(const SelectiveScanBackward& p) {
  SelectiveScanBackward counted = p;
  counted.workspace = nullptr;
  return backward_workspace(counted, scan_layout(p)).floats;
}

int selective_scan_fwd(const SelectiveScanForward& p, void* stream) {
  const ScanLayout layout = scan_layout(p);
  switch (p.u.dtype) {
    case DType::kFloat32: return run_forward<DType::kFloat32>(p, layout, stream);
    case DType::kBFloat16: return run_forward<DType::kBFloat16>(p, layout, stream);
    default: return run_forward<DType::kFloat16>(p, layout, stream);
  }
}

int selective_scan_bwd(const SelectiveScanBackward& p, void* stream) {
  const ScanLayout layout = scan_layout(p);
  switch (p.u.dtype) {
    case DType::kFloat32: return run_backward<DType::kFloat32>(p, layout, stream);
    case DType::kBFloat16: return run_backward<DType::kBFloat16>(p, layout, stream);
    default: return run_backward<DType::kFloat16>(p, layout, stream);
  }
}

}  // namespace ssmtune::cuda
