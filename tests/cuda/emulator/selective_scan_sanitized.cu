// The scan of bfloat16 with up to 16 states alone: what a sanitizer does to the time a compiler takes, all kernels are not worth.
#include "cuda/selective_scan_bwd.h"
#include "cuda/selective_scan_fwd.h"

namespace ssmtune::cuda {

template <DType kDType>
int run_forward(const SelectiveScanForward& p, const ScanLayout& layout, void* stream) {
  if (kDType != DType::kBFloat16 || layout.lanes != 1) return cudaErrorInvalidValue;
  return run_forward_kernel<BFloat16, 16, 1>(p, layout, stream);
}

template <DType kDType>
int run_backward(const SelectiveScanBackward& p, const ScanLayout& layout, void* stream) {
  if (kDType != DType::kBFloat16 || layout.lanes != 4) return cudaErrorInvalidValue;
  const BackwardWorkspace w = backward_workspace(p, layout);
  const SegmentStates segments(p, layout, w.segments);
  if (layout.segments > 1) {
    const SequenceTensors<3> inputs{p.delta, p.dout, p.z};
    const ChannelParameter first{p.dlast_state, p.dim * p.dstate};
    const cudaError_t error =
        find_segment_states<BFloat16, 16, 1, true>(p, inputs, first, segment_layout(p), segments, stream);
    if (error != cudaSuccess) return error;
  }
  return run_backward_kernel<BFloat16, 4, 4>(p, layout, segments, w, stream);
}

template int run_forward<DType::kFloat32>(const SelectiveScanForward&, const ScanLayout&, void*);
template int run_forward<DType::kBFloat16>(const SelectiveScanForward&, const ScanLayout&, void*);
template int run_forward<DType::kFloat16>(const SelectiveScanForward&, const ScanLayout&, void*);
template int run_backward<DType::kFloat32>(const SelectiveScanBackward&, const ScanLayout&, void*);
template int run_backward<DType::kBFloat16>(const SelectiveScanBackward&, const ScanLayout&, void*);
template int run_backward<DType::kFloat16>(const SelectiveScanBackward&, const ScanLayout&, void*);

}  // namespace ssmtune::cuda
