#include "cuda/binding.h"
#include "cuda/selective_scan.h"

namespace ssmtune::cuda {
namespace {

float* floats(const OptionalTensor& x) { return x ? static_cast<float*>(x->data_ptr()) : nullptr; }

void fill(SelectiveScanParams& p, const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
          const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& delta_bias,
          const OptionalTensor& initial_state, const OptionalTensor& state_offset, const OptionalTensor& output_offset,
          const PackedSequences& packed, bool delta_softplus, const OptionalTensor& chunk_states) {
  p.batch = u.size(0), p.dim = u.size(1), p.seqlen = u.size(2), p.dstate = A.size(1);
  p.groups = B.dim() == 4 ? B.size(1) : 1;
  check_sizes({p.batch, p.dim, p.seqlen, p.dstate, p.groups});
  STD_TORCH_CHECK(p.dim % p.groups == 0 && B.dim() == C.dim(), "B and C must share groups that divide dim");
  p.rows = packed.rows;
  p.bounds = packed.bounds();
  STD_TORCH_CHECK(!p.bounds || p.rows <= p.seqlen, "cu_seqlens names ", p.rows, " sequences, but there are ", p.seqlen, " steps");
  const Shape sequence_shape{p.batch, p.dim, p.seqlen}, state_shape{p.batch, p.dstate, p.seqlen};
  const DType dtype = dtype_of(u, "u");
  p.u = sequence(u, "u", sequence_shape, dtype);
  p.delta = sequence(delta, "delta", sequence_shape, dtype);
  p.z = sequence(z, "z", sequence_shape, dtype);
  p.B = states(B, "B", state_shape, p.groups, dtype);
  p.C = states(C, "C", state_shape, p.groups, dtype);
  p.A = contiguous(A, "A", {p.dim, p.dstate});
  p.D = contiguous(D, "D", {p.dim});
  p.delta_bias = contiguous(delta_bias, "delta_bias", {p.dim});
  p.initial_state = channel_parameter(initial_state, "initial_state", p.rows, {p.dim, p.dstate});
  p.state_offset = channel_parameter(state_offset, "state_offset", p.rows, {p.dim, p.dstate});
  p.output_offset = channel_parameter(output_offset, "output_offset", p.rows, {p.dim});
  p.delta_softplus = delta_softplus;
  p.chunk_states = contiguous(chunk_states, "chunk_states", {p.kept_chunks(), p.dim, p.dstate});
}

void check_dimensions(const Tensor& u, const Tensor& A) {
  STD_TORCH_CHECK(u.dim() == 3 && A.dim() == 2, "u must have shape (batch, dim, seqlen) and A (dim, dstate)");
}

template <typename Params>
Tensor set_workspace(Params& p, const Tensor& u) {
  const Tensor workspace = torch::stable::new_empty(u, {workspace_floats(p)}, ScalarType::Float);
  p.workspace = static_cast<float*>(workspace.data_ptr());
  return workspace;
}

void fwd(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C, const OptionalTensor& D,
         const OptionalTensor& z, const OptionalTensor& delta_bias, const OptionalTensor& initial_state,
         const OptionalTensor& state_offset, const OptionalTensor& output_offset, const OptionalTensor& cu_seqlens,
         bool delta_softplus, const Tensor& out, const Tensor& last_state, const OptionalTensor& chunk_states) {
  const Place place(u, delta, A, B, C, D, z, delta_bias, initial_state, state_offset, output_offset, cu_seqlens, out, last_state,
                    chunk_states);
  check_dimensions(u, A);
  const PackedSequences packed("selective_scan", cu_seqlens, u.size(0));
  SelectiveScanForward p{};
  fill(p, u, delta, A, B, C, D, z, delta_bias, initial_state, state_offset, output_offset, packed, delta_softplus, chunk_states);
  p.out = sequence(out, "out", {p.batch, p.dim, p.seqlen}, p.u.dtype);
  p.last_state = contiguous(last_state, "last_state", {p.rows, p.dim, p.dstate});
  const Tensor workspace = set_workspace(p, u);
  check_launch("selective_scan", selective_scan_fwd(p, place.stream()));
}

// dB and dC are views of contiguous tensors with the last two axes the other way round, like B and C with groups or without.
float* state_gradient(const OptionalTensor& x, const char* name, const SelectiveScanParams& p, bool grouped) {
  if (!x) return nullptr;
  Shape shape{p.batch, p.dstate, p.seqlen};
  if (grouped) shape.insert(shape.begin() + 1, p.groups);
  check_shape(*x, name, shape);
  STD_TORCH_CHECK(x->scalar_type() == ScalarType::Float && torch::stable::transpose(*x, -2, -1).is_contiguous(), name,
                  " must be float32 and the transpose of a contiguous (batch, seqlen, dstate) tensor");
  return floats(x);
}

// The gradient of a parameter of `shape`, or of one for each row.
ParameterGradient gradient(const OptionalTensor& x, const char* name, int64_t rows, const Shape& shape) {
  const ChannelParameter parameter = channel_parameter(x, name, rows, shape);
  return {floats(x), parameter.batch_stride};
}

void bwd(const OptionalTensor& dout, const OptionalTensor& dlast_state, const Tensor& u, const Tensor& delta, const Tensor& A,
         const Tensor& B, const Tensor& C, const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& delta_bias,
         const OptionalTensor& initial_state, const OptionalTensor& state_offset, const OptionalTensor& output_offset,
         const OptionalTensor& cu_seqlens, const Tensor& chunk_states, bool delta_softplus, const OptionalTensor& du,
         const OptionalTensor& ddelta, const OptionalTensor& dA, const OptionalTensor& dB, const OptionalTensor& dC,
         const OptionalTensor& dD, const OptionalTensor& dz, const OptionalTensor& ddelta_bias,
         const OptionalTensor& dinitial_state, const OptionalTensor& dstate_offset, const OptionalTensor& doutput_offset) {
  const Place place(u, dout, dlast_state, delta, A, B, C, D, z, delta_bias, initial_state, state_offset, output_offset,
                    cu_seqlens, chunk_states, du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, dinitial_state, dstate_offset,
                    doutput_offset);
  check_dimensions(u, A);
  const PackedSequences packed("selective_scan", cu_seqlens, u.size(0));
  SelectiveScanBackward p{};
  fill(p, u, delta, A, B, C, D, z, delta_bias, initial_state, state_offset, output_offset, packed, delta_softplus, chunk_states);
  STD_TORCH_CHECK(!dz || z, "dz was asked for without z");
  const Shape sequence_shape{p.batch, p.dim, p.seqlen}, matrix{p.dim, p.dstate};
  p.dout = sequence(dout, "dout", sequence_shape, p.u.dtype);
  p.du = sequence(du, "du", sequence_shape, p.u.dtype);
  p.ddelta = sequence(ddelta, "ddelta", sequence_shape, p.u.dtype);
  p.dz = sequence(dz, "dz", sequence_shape, p.u.dtype);
  p.dlast_state = contiguous(dlast_state, "dlast_state", {p.rows, p.dim, p.dstate});
  p.dB = state_gradient(dB, "dB", p, B.dim() == 4);
  p.dC = state_gradient(dC, "dC", p, C.dim() == 4);
  p.dA = contiguous(dA, "dA", matrix);
  p.dD = contiguous(dD, "dD", {p.dim});
  p.ddelta_bias = contiguous(ddelta_bias, "ddelta_bias", {p.dim});
  p.dinitial_state = gradient(dinitial_state, "dinitial_state", p.rows, matrix);
  p.dstate_offset = gradient(dstate_offset, "dstate_offset", p.rows, matrix);
  p.doutput_offset = gradient(doutput_offset, "doutput_offset", p.rows, {p.dim});
  const Tensor workspace = set_workspace(p, u);
  check_launch("selective_scan", selective_scan_bwd(p, place.stream()));
}

}  // namespace
}  // namespace ssmtune::cuda

SSMTUNE_CUDA_IMPL(m) {
  m.impl("selective_scan_fwd", TORCH_BOX(&ssmtune::cuda::fwd));
  m.impl("selective_scan_bwd", TORCH_BOX(&ssmtune::cuda::bwd));
}
