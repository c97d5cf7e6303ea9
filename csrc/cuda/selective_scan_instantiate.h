// The kernels of one dtype, for any number of states; each .cu file that includes this instantiates one.
#pragma once

#include "cuda/selective_scan_bwd.h"
#include "cuda/selective_scan_fwd.h"

namespace ssmtune::cuda {

template <DType kDType>
struct Element;
template <>
struct Element<DType::kFloat32> {
  using Type = float;
};
template <>
struct Element<DType::kBFloat16> {
  using Type = BFloat16;
};
template <>
struct Element<DType::kFloat16> {
  using Type = Float16;
};

template <DType kDType>
int run_forward(const SelectiveScanForward& p, const ScanLayout& layout, void* stream) {
  using T = typename Element<kDType>::Type;
  switch (layout.lanes) {
    case 1: return run_forward_kernel<T, 16, 1>(p, layout, stream);
    case 2: return run_forward_kernel<T, 16, 2>(p, layout, stream);
    case 4: return run_forward_kernel<T, 16, 4>(p, layout, stream);
    case 8: return run_forward_kernel<T, 16, 8>(p, layout, stream);
    default: return run_forward_kernel<T, 16, 16>(p, layout, stream);
  }
}

template <typename T>
cudaError_t find_adjoints(const SelectiveScanBackward& p, const SegmentStates& segments, void* stream) {
  const ScanLayout layout = segment_layout(p);
  const SequenceTensors<3> inputs{p.delta, p.dout, p.z};
  const ChannelParameter first{p.dlast_state, p.dim * p.dstate};
  switch (layout.lanes) {
    case 1: return find_segment_states<T, 16, 1, true>(p, inputs, first, layout, segments, stream);
    case 2: return find_segment_states<T, 16, 2, true>(p, inputs, first, layout, segments, stream);
    case 4: return find_segment_states<T, 16, 4, true>(p, inputs, first, layout, segments, stream);
    case 8: return find_segment_states<T, 16, 8, true>(p, inputs, first, layout, segments, stream);
    default: return find_segment_states<T, 16, 16, true>(p, inputs, first, layout, segments, stream);
  }
}

template <DType kDType>
int run_backward(const SelectiveScanBackward& p, const ScanLayout& layout, void* stream) {
  using T = typename Element<kDType>::Type;
  const BackwardWorkspace w = backward_workspace(p, layout);
  const SegmentStates segments(p, layout, w.segments);
  if (layout.segments > 1) {
    const cudaError_t error = find_adjoints<T>(p, segments, stream);
    if (error != cudaSuccess) return error;
  }
  switch (layout.lanes * layout.states) {
    case 16: return run_backward_kernel<T, 4, 4>(p, layout, segments, w, stream);
    case 32: return run_backward_kernel<T, 4, 8>(p, layout, segments, w, stream);
    case 64: return run_backward_kernel<T, 4, 16>(p, layout, segments, w, stream);
    case 128: return run_backward_kernel<T, 4, 32>(p, layout, segments, w, stream);
    default: return run_backward_kernel<T, 8, 32>(p, layout, segments, w, stream);
  }
}

}  // namespace ssmtune::cuda
