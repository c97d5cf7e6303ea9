// Choice of instruction set at run time.
#pragma once

#include "cpu/params.h"
#include "cpu/ssd_params.h"

namespace ssmtune {

// A kernel runs one task at a time in scratch memory of its own, aligned to 64 bytes.
template <typename Params>
struct Kernel {
  int64_t (*scratch_floats)(const Params&);
  void (*run)(const Params&, int64_t task, float* scratch);
};

// The kernels of one instruction set. Every file in cpu/kernels is compiled once for each.
struct KernelTable {
  const char* capability;
  Kernel<SelectiveScanForward> selective_scan_fwd;
  Kernel<SelectiveScanBackward> selective_scan_bwd;
  Kernel<SsdScanForward> ssd_scan_fwd;
  Kernel<SsdScanBackward> ssd_scan_bwd;
  Kernel<CausalConv1dForward> causal_conv1d_fwd;
  Kernel<CausalConv1dBackward> causal_conv1d_bwd;
  // Update the channels [begin, end) of one row of the batch.
  void (*selective_state_update)(const SelectiveStateUpdate&, int64_t row, int64_t begin, int64_t end);
  void (*causal_conv1d_update)(const CausalConv1dUpdate&, int64_t row, int64_t begin, int64_t end);
};

// The best table this machine can run, or the one named by the environment variable SSMTUNE_CPU_CAPABILITY. Throws
// std::runtime_error if that name is unknown or needs instructions the machine does not have.
const KernelTable& kernels();

}  // namespace ssmtune
