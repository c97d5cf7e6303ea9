#include "cuda/selective_scan_instantiate.h"

namespace ssmtune::cuda {

template int run_forward<DType::kBFloat16>(const SelectiveScanForward&, const ScanLayout&, void*);
template int run_backward<DType::kBFloat16>(const SelectiveScanBackward&, const ScanLayout&, void*);

}  // namespace ssmtune::cuda
