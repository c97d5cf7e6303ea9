// What is asked of the CUDA runtime besides launches.
#pragma once

#include <string>

namespace ssmtune::cuda {

std::string error_text(int error);
// Empty, or why the kernels in this library cannot run on the current device.
std::string why_not();

}  // namespace ssmtune::cuda
