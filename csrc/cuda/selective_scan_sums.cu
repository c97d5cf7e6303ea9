// The last step of the backward scan: sums of what its blocks have left behind.
#include "cuda/device.h"
#include "cuda/selective_scan_launch.h"

namespace ssmtune::cuda {
namespace {

// Adds up the shares of a gradient in their order.
__global__ void __launch_bounds__(kScanThreads) sum_shares_kernel(const GradientShares shares) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kScanThreads + threadIdx.x;
  if (i >= shares.size) return;
  float sum = 0.0f;
  for (int64_t share = 0; share < shares.count; ++share) sum += shares.data[share * shares.size + i];
  shares.target[i] = sum;
}

// The same for dB and dC: over the blocks of channels of each section.
__global__ void __launch_bounds__(kScanThreads)
    sum_state_gradients_kernel(const SelectiveScanBackward p, const ScanLayout layout, const float* dBC) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kScanThreads + threadIdx.x;
  if (i >= p.batch * p.groups * p.seqlen * p.dstate) return;
  const int64_t n = i % p.dstate, t = i / p.dstate % p.seqlen, section = i / p.dstate / p.seqlen;
  const int64_t padded = layout.states * layout.lanes;
  const float* share = dBC + (section * layout.section_blocks * p.seqlen + t) * 2 * padded + n;
  float dB = 0.0f, dC = 0.0f;
  for (int64_t block = 0; block < layout.section_blocks; ++block, share += p.seqlen * 2 * padded) {
    dB += share[0];
    dC += share[padded];
  }
  if (p.dB) p.dB[i] = dB;
  if (p.dC) p.dC[i] = dC;
}

int64_t ceil_div(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

}  // namespace

int sum_shares(const GradientShares& shares, void* stream) {
  if (shares.count < 2) return cudaSuccess;
  return launch(sum_shares_kernel, ceil_div(shares.size, kScanThreads), kScanThreads, 0, stream, shares);
}

int sum_state_gradients(const SelectiveScanBackward& p, const ScanLayout& layout, const float* dBC, void* stream) {
  const int64_t blocks = ceil_div(p.batch * p.groups * p.seqlen * p.dstate, kScanThreads);
  return launch(sum_state_gradients_kernel, blocks, kScanThreads, 0, stream, p, layout, dBC);
}

}  // namespace ssmtune::cuda
