// The operators ssmtune_native::*. Results are written into tensors the caller allocated; one that is None is not computed.
// The file of each operator binds its kernels.

#include <torch/csrc/stable/library.h>

#include <string>

#include "cpu/dispatch.h"

STABLE_TORCH_LIBRARY(ssmtune_native, m) {
  m.def(
      "selective_scan_fwd(Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? delta_bias, "
      "Tensor? initial_state, Tensor? state_offset, Tensor? output_offset, Tensor? cu_seqlens, bool delta_softplus, "
      "Tensor(a!) out, Tensor(b!) last_state, Tensor(c!)? chunk_states) -> ()");
  m.def(
      "selective_scan_bwd(Tensor? dout, Tensor? dlast_state, Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, "
      "Tensor? z, Tensor? delta_bias, Tensor? initial_state, Tensor? state_offset, Tensor? output_offset, Tensor? cu_seqlens, "
      "Tensor chunk_states, bool delta_softplus, Tensor(a!)? du, Tensor(b!)? ddelta, Tensor(c!)? dA, Tensor(d!)? dB, "
      "Tensor(e!)? dC, Tensor(f!)? dD, Tensor(g!)? dz, Tensor(h!)? ddelta_bias, Tensor(i!)? dinitial_state, Tensor(j!)? dstate_offset, "
      "Tensor(k!)? doutput_offset) -> ()");
  m.def(
      "ssd_scan_fwd(Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? dt_bias, Tensor? initial_states, "
      "Tensor? state_offset, Tensor? output_offset, Tensor? cu_seqlens, bool dt_softplus, float dt_min, float dt_max, "
      "Tensor(a!) out, Tensor(b!) final_states, Tensor(c!)? chunk_states) -> ()");
  m.def(
      "ssd_scan_bwd(Tensor? dout, Tensor? dfinal_states, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, "
      "Tensor? dt_bias, Tensor? initial_states, Tensor? state_offset, Tensor? output_offset, Tensor? cu_seqlens, "
      "Tensor chunk_states, bool dt_softplus, float dt_min, float dt_max, Tensor(a!)? dx, Tensor(b!)? ddt, Tensor(c!)? dA, "
      "Tensor(d!)? dB, Tensor(e!)? dC, Tensor(f!)? dD, Tensor(g!)? ddt_bias, Tensor(h!)? dinitial_states, "
      "Tensor(i!)? dstate_offset, Tensor(j!)? doutput_offset) -> ()");
  m.def(
      "selective_state_update(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
      "Tensor? dt_bias, bool dt_softplus, Tensor? state_offset, Tensor? output_offset, Tensor? adapter_index) -> Tensor");
  m.def(
      "causal_conv1d_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor? initial_states, Tensor? cu_seqlens, bool silu, "
      "Tensor(a!) out, Tensor(b!)? final_states) -> ()");
  m.def(
      "causal_conv1d_bwd(Tensor dout, Tensor? dfinal_states, Tensor x, Tensor weight, Tensor? bias, Tensor? initial_states, "
      "Tensor? cu_seqlens, bool silu, Tensor(a!)? dx, Tensor(b!)? dweight, Tensor(c!)? dbias, "
      "Tensor(d!)? dinitial_states) -> ()");
  m.def(
      "causal_conv1d_update(Tensor x, Tensor(a!) conv_state, Tensor weight, Tensor? bias, bool silu) -> Tensor");
  m.def("cpu_capability() -> str");
}

namespace ssmtune {
namespace {

std::string cpu_capability() { return kernels().capability; }

}  // namespace
}  // namespace ssmtune

STABLE_TORCH_LIBRARY_IMPL(ssmtune_native, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&ssmtune::cpu_capability));
}
