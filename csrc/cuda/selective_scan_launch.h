// Between the launch arithmetic and the kernels: what only they need of each other. Free of CUDA.
#pragma once

#include "cuda/selective_scan.h"

namespace ssmtune::cuda {

// The shares that blocks have in the gradient of a parameter, added up in their order when all are done. A single share is the
// gradient itself.
struct GradientShares {
  float* target = nullptr;  // the gradient; null if it is not wanted
  float* data = nullptr;
  int64_t size = 0, count = 0;  // of the gradient, all rows of it; and the number of shares
  int64_t row_stride = 0;       // of the gradient; 0 if rows share it
};

struct BackwardWorkspace {
  float* segments;  // SegmentStates
  float* dBC;       // (batch, channel blocks, seqlen, 2, padded states): each block's share of dB and dC
  GradientShares dA, dD, ddelta_bias, dinitial_state, dstate_offset, doutput_offset;
  int64_t floats;
};

BackwardWorkspace backward_workspace(const SelectiveScanBackward& p, const ScanLayout& layout);
// How the first pass over the segments is laid out.
ScanLayout segment_layout(const SelectiveScanBackward& p);

// What a backward scan ends with (selective_scan_sums.cu).
int sum_shares(const GradientShares& shares, void* stream);
int sum_state_gradients(const SelectiveScanBackward& p, const ScanLayout& layout, const float* dBC, void* stream);

// One translation unit for each dtype.
template <DType kDType>
int run_forward(const SelectiveScanForward& p, const ScanLayout& layout, void* stream);
template <DType kDType>
int run_backward(const SelectiveScanBackward& p, const ScanLayout& layout, void* stream);

}  // namespace ssmtune::cuda
