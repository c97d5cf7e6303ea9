// The launchers of the selective scan for ctypes: they allocate their workspace and say in words what failed.
#include "cuda/selective_scan.h"

#include <cuda_runtime.h>

#include <cmath>
#include <vector>

namespace {

using namespace ssmtune::cuda;

template <typename Params>
const char* run(Params p, int (*launcher)(const Params&, void*)) {
  std::vector<float> workspace(workspace_floats(p), NAN);
  p.workspace = workspace.data();
  const int error = launcher(p, nullptr);
  if (error == cudaErrorLaunchFailure) return emulator::error();
  return error == cudaSuccess ? "" : "the launch was refused";
}

template <typename Params>
void describe(const Params& p, int64_t* numbers) {
  const ScanLayout layout = scan_layout(p);
  for (const int64_t number : {layout.states, layout.lanes, layout.block_channels, layout.section_blocks, layout.channel_blocks,
                               layout.row_groups, layout.segments, layout.blocks(), workspace_floats(p)}) {
    *numbers++ = number;
  }
}

}  // namespace

extern "C" {

int64_t forward_size() { return sizeof(SelectiveScanForward); }
int64_t backward_size() { return sizeof(SelectiveScanBackward); }
void set_order(unsigned order) { emulator::set_order(order); }
const char* scan_forward(const SelectiveScanForward* p) { return run(*p, selective_scan_fwd); }
const char* scan_backward(const SelectiveScanBackward* p) { return run(*p, selective_scan_bwd); }
void forward_layout(const SelectiveScanForward* p, int64_t* numbers) { describe(*p, numbers); }
void backward_layout(const SelectiveScanBackward* p, int64_t* numbers) { describe(*p, numbers); }
}
