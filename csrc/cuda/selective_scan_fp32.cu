#include "cuda/selective_scan_instantiate.h"

namespace ssmtune::cuda {

template int run_forward<DType::kFloat32>(const SelectiveScanForward&, const ScanLayout&, void*);
template int run_backward<DType::kFloat32>(const SelectiveScanBackward&, const ScanLayout&, void*);

}  // namespace ssmtune::cuda
