#include "cpu/dispatch.h"

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace ssmtune {

#define SSMTUNE_DECLARE_KERNELS(capability)                                                 \
  namespace capability {                                                                    \
  extern const Kernel<SelectiveScanForward> selective_scan_fwd;                             \
  extern const Kernel<SelectiveScanBackward> selective_scan_bwd;                            \
  extern const Kernel<SsdScanForward> ssd_scan_fwd;                                         \
  extern const Kernel<SsdScanBackward> ssd_scan_bwd;                                        \
  extern const Kernel<CausalConv1dForward> causal_conv1d_fwd;                               \
  extern const Kernel<CausalConv1dBackward> causal_conv1d_bwd;                              \
  void selective_state_update(const SelectiveStateUpdate&, int64_t, int64_t, int64_t);      \
  void causal_conv1d_update(const CausalConv1dUpdate&, int64_t, int64_t, int64_t);          \
  }
#define SSMTUNE_KERNEL_TABLE(capability, name)                                              \
  KernelTable {                                                                             \
    name, capability::selective_scan_fwd, capability::selective_scan_bwd,                   \
        capability::ssd_scan_fwd, capability::ssd_scan_bwd,                                 \
        capability::causal_conv1d_fwd, capability::causal_conv1d_bwd,                       \
        capability::selective_state_update, capability::causal_conv1d_update                \
  }

SSMTUNE_DECLARE_KERNELS(default_)
#ifdef __x86_64__
SSMTUNE_DECLARE_KERNELS(avx2)
SSMTUNE_DECLARE_KERNELS(avx512)
SSMTUNE_DECLARE_KERNELS(avx512_bf16)
#endif

namespace {

struct Candidate {
  const char* name;
  bool supported;
  KernelTable (*table)();
};

KernelTable choose() {
#ifdef __x86_64__
  // Every processor with AVX2 and FMA also has F16C.
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
  const Candidate candidates[] = {
#ifdef __x86_64__
      {"avx512_bf16", has_avx512 && __builtin_cpu_supports("avx512bf16"),
       [] { return SSMTUNE_KERNEL_TABLE(avx512_bf16, "avx512_bf16"); }},
      {"avx512", has_avx512, [] { return SSMTUNE_KERNEL_TABLE(avx512, "avx512"); }},
      {"avx2", has_avx2, [] { return SSMTUNE_KERNEL_TABLE(avx2, "avx2"); }},
#endif
      {"default", true, [] { return SSMTUNE_KERNEL_TABLE(default_, "default"); }},
  };

  const char* forced = std::getenv("SSMTUNE_CPU_CAPABILITY");
  const std::string wanted = forced ? forced : "";
  std::string supported;
  for (const Candidate& candidate : candidates) {
    if (!candidate.supported) continue;
    if (wanted.empty() || wanted == candidate.name) return candidate.table();
    supported += (supported.empty() ? "" : ", ") + std::string(candidate.name);
  }
  throw std::runtime_error("SSMTUNE_CPU_CAPABILITY is '" + wanted + "', which this machine cannot run.\n  Supported here: " +
                           supported + ". Leave it unset to take the best one.");
}

}  // namespace

const KernelTable& kernels() {
  static const KernelTable table = choose();
  return table;
}

}  // namespace ssmtune
