// The operators ssmtune_native::*: schemas, checks, and the split of their work over threads. Results are written into
// tensors the caller allocated; one that is None is not computed.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <cstdint>
#include <memory>
#include <new>
#include <optional>
#include <string>
#if defined(__SANITIZE_THREAD__)
#include <thread>
#endif
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "cpu/dispatch.h"

namespace ssmtune {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Shape = std::vector<int64_t>;

// ---- checks --------------------------------------------------------------------------------------------------------

std::string to_string(const int64_t* sizes, int64_t count) {
  std::string text = "(";
  for (int64_t i = 0; i < count; ++i) text += (i ? ", " : "") + std::to_string(sizes[i]);
  return text + ")";
}

void check_shape(const Tensor& x, const char* name, const Shape& shape) {
  const int64_t dims = x.dim();
  bool same = dims == static_cast<int64_t>(shape.size());
  for (int64_t i = 0; same && i < dims; ++i) same = x.size(i) == shape[i];
  STD_TORCH_CHECK(same, name, " has shape ", to_string(x.sizes().data(), dims), ", expected ",
                  to_string(shape.data(), static_cast<int64_t>(shape.size())));
  STD_TORCH_CHECK(x.is_cpu(), name, " is not on the CPU");
}

void check_sizes(std::initializer_list<int64_t> sizes) {
  for (const int64_t size : sizes) STD_TORCH_CHECK(size >= 1, "a dimension is empty");
}

DType dtype_of(const Tensor& x, const char* name) {
  switch (x.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::BFloat16: return DType::kBFloat16;
    case ScalarType::Half: return DType::kFloat16;
    default: STD_TORCH_CHECK(false, name, " must be float32, bfloat16 or float16");
  }
}

// A (batch, channels, time) tensor of any of the two layouts.
SequenceTensor sequence(const Tensor& x, const char* name, const Shape& shape, DType dtype) {
  check_shape(x, name, shape);
  STD_TORCH_CHECK(dtype_of(x, name) == dtype, name, " must have the dtype of the input");
  const bool channels_adjacent = x.stride(1) == 1 || shape[1] == 1, steps_adjacent = x.stride(2) == 1 || shape[2] == 1;
  STD_TORCH_CHECK(channels_adjacent || steps_adjacent, name, " must have stride 1 along its channels or its steps, got strides ",
                  to_string(x.strides().data(), 3));
  const bool channels_last = x.stride(1) == 1 || (channels_adjacent && x.stride(2) != 1);
  return {x.data_ptr(), dtype, channels_last, x.stride(0), channels_last ? x.stride(2) : x.stride(1)};
}
SequenceTensor sequence(const OptionalTensor& x, const char* name, const Shape& shape, DType dtype) {
  return x ? sequence(*x, name, shape, dtype) : SequenceTensor{};
}

// B or C: (batch, states, time), or (batch, groups, states, time).
StateTensor states(const Tensor& x, const char* name, Shape shape, int64_t groups, DType dtype) {
  StateTensor tensor;
  if (x.dim() == 4) {
    shape.insert(shape.begin() + 1, groups);
    check_shape(x, name, shape);
    const Tensor first = torch::stable::select(x, 1, 0);
    static_cast<SequenceTensor&>(tensor) = sequence(first, name, {shape[0], shape[2], shape[3]}, dtype);
    tensor.group_stride = x.stride(1);
  } else {
    static_cast<SequenceTensor&>(tensor) = sequence(x, name, shape, dtype);
  }
  return tensor;
}

// Where packed sequences start, and where the last one ends: they must cut up the steps, or a kernel would reach past them, and
// a compiled graph gets here without any other check. Empty without cu_seqlens.
std::vector<int64_t> sequence_bounds(const char* op, const OptionalTensor& cu_seqlens, int64_t batch, int64_t seqlen) {
  if (!cu_seqlens) return {};
  const bool wide = cu_seqlens->scalar_type() == ScalarType::Long;
  STD_TORCH_CHECK(wide || cu_seqlens->scalar_type() == ScalarType::Int, op, ": cu_seqlens must be int32 or int64");
  STD_TORCH_CHECK(cu_seqlens->is_cpu() && cu_seqlens->dim() == 1 && cu_seqlens->size(0) >= 2 && batch == 1, op,
                  ": cu_seqlens must have shape (n_sequences + 1,) and lie on the CPU, and the batch must be 1");
  const int64_t stride = cu_seqlens->stride(0);
  std::vector<int64_t> bounds(cu_seqlens->size(0));
  for (size_t i = 0; i < bounds.size(); ++i) {
    bounds[i] = wide ? static_cast<const int64_t*>(cu_seqlens->data_ptr())[i * stride]
                     : static_cast<const int32_t*>(cu_seqlens->data_ptr())[i * stride];
    const bool in_order = i == 0 ? bounds[i] == 0 : bounds[i] > bounds[i - 1];
    STD_TORCH_CHECK(in_order && (i + 1 < bounds.size() || bounds[i] == seqlen), op, ": cu_seqlens has ", bounds[i],
                    " as value ", i, ", but must start with 0, increase, and end with seqlen = ", seqlen,
                    ".\n  Each step belongs to a sequence, none is empty. Pass 0, then the cumulative sum of the lengths.");
  }
  return bounds;
}

// Asks for huge pages under a large result: it is mostly memory the process has not touched yet, and to fetch that in pages
// of 4 KiB can take longer than the scan that fills it.
void prefer_huge_pages([[maybe_unused]] void* data, [[maybe_unused]] int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kHugePage = 2 << 20;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kHugePage - 1) / kHugePage * kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + bytes) / kHugePage * kHugePage;
  // a hint: where it fails, nothing is lost
  if (begin < end) madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

// A sequence tensor that is about to be written.
SequenceTensor result(const OptionalTensor& x, const char* name, const Shape& shape, DType dtype) {
  const SequenceTensor tensor = sequence(x, name, shape, dtype);
  if (x) {
    const int64_t rows = shape[tensor.channels_last ? 2 : 1];
    const int64_t extent = (shape[0] - 1) * tensor.batch_stride + rows * tensor.stride;
    prefer_huge_pages(tensor.data, extent * (dtype == DType::kFloat32 ? 4 : 2));
  }
  return tensor;
}

float* contiguous(const Tensor& x, const char* name, const Shape& shape) {
  check_shape(x, name, shape);
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float && x.is_contiguous(), name, " must be float32 and contiguous");
  return static_cast<float*>(x.data_ptr());
}
float* contiguous(const OptionalTensor& x, const char* name, const Shape& shape) {
  return x ? contiguous(*x, name, shape) : nullptr;
}

// A parameter of `shape`, or one for each row of the batch.
ChannelParameter channel_parameter(const OptionalTensor& x, const char* name, int64_t batch, Shape shape) {
  if (!x) return {};
  int64_t row = 1;
  for (const int64_t size : shape) row *= size;
  const bool shared = x->dim() == static_cast<int64_t>(shape.size());
  if (!shared) shape.insert(shape.begin(), batch);
  return {contiguous(*x, name, shape), shared ? 0 : row};
}

// ---- work ----------------------------------------------------------------------------------------------------------

// Enough tasks to keep some 16 threads busy, from rows of the batch first and from channels for the rest. `max_ranges`
// bounds what each range of channels costs in memory.
constexpr int64_t kTasks = 16;
Partition make_partition(int64_t batch, int64_t dim, int64_t max_ranges, int64_t sections = 1) {
  Partition partition{batch, dim, std::min(batch, kTasks), sections, sections};
  const int64_t ranges = (kTasks + partition.groups - 1) / partition.groups;
  const int64_t section_ranges = std::min({ranges / sections, partition.units(), max_ranges / sections});
  partition.ranges = sections * std::max<int64_t>(1, section_ranges);
  return partition;
}

// The same for packed sequences: from channels first, for the lengths of sequences may differ. Groups of them have about as
// many steps each; `group_begin` is where they are kept.
Partition make_partition(const std::vector<int64_t>& bounds, int64_t dim, int64_t max_ranges, int64_t sections,
                         std::vector<int64_t>& group_begin) {
  Partition partition = make_partition(1, dim, max_ranges, sections);
  partition.batch = static_cast<int64_t>(bounds.size()) - 1;
  partition.groups = std::min(partition.batch, (kTasks + partition.ranges - 1) / partition.ranges);
  for (int64_t group = 0; group <= partition.groups; ++group) {
    const int64_t step = bounds.back() * group / partition.groups;
    group_begin.push_back(std::lower_bound(bounds.begin(), bounds.end(), step) - bounds.begin());
  }
  partition.group_begin = group_begin.data();
  return partition;
}

constexpr std::align_val_t kAlignment{64};
struct AlignedDelete {
  void operator()(float* p) const { ::operator delete[](p, kAlignment); }
};
using Buffer = std::unique_ptr<float[], AlignedDelete>;

Buffer allocate(int64_t count) {
  Buffer buffer(static_cast<float*>(::operator new[](std::max<int64_t>(count, 1) * sizeof(float), kAlignment)));
  prefer_huge_pages(buffer.get(), count * sizeof(float));
  return buffer;
}

// `work` is about the number of element updates of all tasks: small problems stay on one thread.
int64_t grain(int64_t tasks, int64_t work) {
  constexpr int64_t kWorkPerThread = 1 << 15;
  return std::clamp<int64_t>(kWorkPerThread * tasks / std::max<int64_t>(work, 1), 1, tasks);
}

#if defined(__SANITIZE_THREAD__)
// ThreadSanitizer does not see how the threads of torch's pool wait for each other, and would report each result as a race.
// It sees these, which also share small problems, so that there is something to watch.
template <typename Function>
void parallel_for(int64_t begin, int64_t end, int64_t, const Function& function) {
  const int64_t threads = std::min<int64_t>(end - begin, torch::stable::get_num_threads());
  std::vector<std::thread> pool;
  for (int64_t i = 0; i < threads; ++i) {
    const int64_t from = begin + (end - begin) * i / threads, to = begin + (end - begin) * (i + 1) / threads;
    pool.emplace_back([&function, from, to] { function(from, to); });
  }
  for (std::thread& thread : pool) thread.join();
}
#else
using torch::stable::parallel_for;
#endif

template <typename Params>
void run(const Kernel<Params>& kernel, const Params& params, int64_t work) {
  const int64_t tasks = params.partition.tasks();
  parallel_for(0, tasks, grain(tasks, work), [&](int64_t begin, int64_t end) {
    const Buffer scratch = allocate(kernel.scratch_floats(params));
    for (int64_t task = begin; task < end; ++task) kernel.run(params, task, scratch.get());
  });
}

// The gradient of a parameter: written by the kernel in place where each value has one writer, else added up over the
// groups of a partition by finish().
class Gradient {
 public:
  Gradient(const OptionalTensor& x, const char* name, const Partition& partition, Shape shape) : groups_(partition.groups) {
    for (const int64_t size : shape) size_ *= size;
    if (!x) return;
    const bool shared = x->dim() == static_cast<int64_t>(shape.size());
    if (!shared) shape.insert(shape.begin(), partition.batch);
    target_ = contiguous(*x, name, shape);
    row_stride_ = shared ? 0 : size_;
    if (shared && groups_ > 1) partial_ = allocate(groups_ * size_);
  }

  ChannelGradient get() { return {partial_ ? partial_.get() : target_, row_stride_, partial_ ? size_ : 0}; }

  void finish() const {
    if (!partial_) return;
    for (int64_t i = 0; i < size_; ++i) target_[i] = partial_[i];
    for (int64_t group = 1; group < groups_; ++group) {
      for (int64_t i = 0; i < size_; ++i) target_[i] += partial_[group * size_ + i];
    }
  }

 private:
  int64_t groups_, size_ = 1, row_stride_ = 0;
  float* target_ = nullptr;
  Buffer partial_;
};

// ---- selective scan ------------------------------------------------------------------------------------------------

// Sums over ranges of channels are kept until the end; they may take about a third of the memory of u.
int64_t max_scan_ranges(int64_t dim, int64_t dstate) { return std::max<int64_t>(4, dim / (6 * dstate)); }

// What the parameters of one call point to besides tensors.
struct PackedSequences {
  std::vector<int64_t> bounds, group_begin;
};

void fill_scan(SelectiveScanParams& p, PackedSequences& packed, const Tensor& u, const Tensor& delta, const Tensor& A,
               const Tensor& B, const Tensor& C, const OptionalTensor& D, const OptionalTensor& z,
               const OptionalTensor& delta_bias, const OptionalTensor& initial_state, const OptionalTensor& state_offset, const OptionalTensor& output_offset,
               const OptionalTensor& cu_seqlens, bool delta_softplus, const OptionalTensor& chunk_states) {
  STD_TORCH_CHECK(u.dim() == 3 && A.dim() == 2, "u must have shape (batch, dim, seqlen) and A (dim, dstate)");
  p.batch = u.size(0), p.dim = u.size(1), p.seqlen = u.size(2), p.dstate = A.size(1);
  check_sizes({p.batch, p.dim, p.seqlen, p.dstate});
  const int64_t groups = B.dim() == 4 ? B.size(1) : 1, max_ranges = max_scan_ranges(p.dim, p.dstate);
  STD_TORCH_CHECK(groups >= 1 && p.dim % groups == 0 && B.dim() == C.dim(), "B and C must share groups that divide dim");
  p.rows = p.batch;
  packed.bounds = sequence_bounds("selective_scan", cu_seqlens, p.batch, p.seqlen);
  if (cu_seqlens) {
    p.bounds = packed.bounds.data();
    p.rows = static_cast<int64_t>(packed.bounds.size()) - 1;
    p.partition = make_partition(packed.bounds, p.dim, max_ranges, groups, packed.group_begin);
  } else {
    p.partition = make_partition(p.batch, p.dim, max_ranges, groups);
  }
  const Shape sequence_shape{p.batch, p.dim, p.seqlen}, state_shape{p.batch, p.dstate, p.seqlen};
  const DType dtype = dtype_of(u, "u");
  p.u = sequence(u, "u", sequence_shape, dtype);
  p.delta = sequence(delta, "delta", sequence_shape, dtype);
  p.z = sequence(z, "z", sequence_shape, dtype);
  p.B = states(B, "B", state_shape, groups, dtype);
  p.C = states(C, "C", state_shape, groups, dtype);
  p.A = contiguous(A, "A", {p.dim, p.dstate});
  p.D = contiguous(D, "D", {p.dim});
  p.delta_bias = contiguous(delta_bias, "delta_bias", {p.dim});
  p.initial_state = channel_parameter(initial_state, "initial_state", p.rows, {p.dim, p.dstate});
  p.state_offset = channel_parameter(state_offset, "state_offset", p.rows, {p.dim, p.dstate});
  p.output_offset = channel_parameter(output_offset, "output_offset", p.rows, {p.dim});
  p.delta_softplus = delta_softplus;
  p.chunk_states =
      contiguous(chunk_states, "chunk_states", {p.batch, p.first_chunk(p.rows) / p.batch, p.kept_channels(), p.dstate});
}

void selective_scan_fwd(const Tensor& u, const Tensor& delta, const Tensor& A, const Tensor& B, const Tensor& C,
                        const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& delta_bias,
                        const OptionalTensor& initial_state, const OptionalTensor& state_offset,
                        const OptionalTensor& output_offset, const OptionalTensor& cu_seqlens, bool delta_softplus,
                        const Tensor& out, const Tensor& last_state, const OptionalTensor& chunk_states) {
  SelectiveScanForward p{};
  PackedSequences packed;
  fill_scan(p, packed, u, delta, A, B, C, D, z, delta_bias, initial_state, state_offset, output_offset, cu_seqlens,
            delta_softplus, chunk_states);
  p.out = result(out, "out", {p.batch, p.dim, p.seqlen}, p.u.dtype);
  p.last_state = contiguous(last_state, "last_state", {p.rows, p.dim, p.dstate});
  if (chunk_states) prefer_huge_pages(p.chunk_states, chunk_states->numel() * sizeof(float));
  run(kernels().selective_scan_fwd, p, p.batch * p.dim * p.seqlen * p.dstate);
}

// Adds up the ranges' shares of dB and dC, in their order: for each row of the batch and group, those of its channels.
void reduce_dBC(const SelectiveScanBackward& p, const float* shares, float* dB, float* dC) {
  const int64_t ranges = p.partition.section_ranges(), row = 2 * p.padded_states();
  parallel_for(0, p.batch * p.partition.sections * p.seqlen, 256, [&](int64_t begin, int64_t end) {
    std::vector<float> sum(row);
    for (int64_t step = begin; step < end; ++step) {
      const float* share = shares + (step / p.seqlen * ranges * p.seqlen + step % p.seqlen) * row;
      std::copy_n(share, row, sum.data());
      for (int64_t range = 1; range < ranges; ++range) {
        share += p.seqlen * row;
        for (int64_t i = 0; i < row; ++i) sum[i] += share[i];
      }
      if (dB) std::copy_n(sum.data(), p.dstate, dB + step * p.dstate);
      if (dC) std::copy_n(sum.data() + p.padded_states(), p.dstate, dC + step * p.dstate);
    }
  });
}

// dB and dC are views of contiguous tensors with the last two axes the other way round, like B and C with groups or without.
float* state_gradient(const OptionalTensor& x, const char* name, const SelectiveScanParams& p, bool grouped) {
  if (!x) return nullptr;
  Shape shape{p.batch, p.dstate, p.seqlen};
  if (grouped) shape.insert(shape.begin() + 1, p.partition.sections);
  check_shape(*x, name, shape);
  STD_TORCH_CHECK(x->scalar_type() == ScalarType::Float && torch::stable::transpose(*x, -2, -1).is_contiguous(), name,
                  " must be float32 and the transpose of a contiguous (batch, seqlen, dstate) tensor");
  return static_cast<float*>(x->data_ptr());
}

void selective_scan_bwd(const OptionalTensor& dout, const OptionalTensor& dlast_state, const Tensor& u, const Tensor& delta,
                        const Tensor& A, const Tensor& B, const Tensor& C, const OptionalTensor& D, const OptionalTensor& z,
                        const OptionalTensor& delta_bias, const OptionalTensor& initial_state,
                        const OptionalTensor& state_offset, const OptionalTensor& output_offset,
                        const OptionalTensor& cu_seqlens, const Tensor& chunk_states, bool delta_softplus,
                        const OptionalTensor& du, const OptionalTensor& ddelta, const OptionalTensor& dA,
                        const OptionalTensor& dB, const OptionalTensor& dC, const OptionalTensor& dD, const OptionalTensor& dz,
                        const OptionalTensor& ddelta_bias, const OptionalTensor& dinitial_state,
                        const OptionalTensor& dstate_offset, const OptionalTensor& doutput_offset) {
  SelectiveScanBackward p{};
  PackedSequences packed;
  fill_scan(p, packed, u, delta, A, B, C, D, z, delta_bias, initial_state, state_offset, output_offset, cu_seqlens,
            delta_softplus, chunk_states);
  const Shape sequence_shape{p.batch, p.dim, p.seqlen}, matrix_shape{p.dim, p.dstate}, vector_shape{p.dim};
  STD_TORCH_CHECK(!dz || z, "dz was asked for without z");
  p.dout = sequence(dout, "dout", sequence_shape, p.u.dtype);
  p.du = result(du, "du", sequence_shape, p.u.dtype);
  p.ddelta = result(ddelta, "ddelta", sequence_shape, p.u.dtype);
  p.dz = result(dz, "dz", sequence_shape, p.u.dtype);
  p.dlast_state = contiguous(dlast_state, "dlast_state", {p.rows, p.dim, p.dstate});
  float* const dB_target = state_gradient(dB, "dB", p, B.dim() == 4);
  float* const dC_target = state_gradient(dC, "dC", p, C.dim() == 4);
  Buffer dBC;
  if (dB || dC) dBC = allocate(p.batch * p.partition.ranges * p.seqlen * 2 * p.padded_states());
  p.dBC = dBC.get();
  Gradient gradients[] = {{dA, "dA", p.partition, matrix_shape},
                          {dD, "dD", p.partition, vector_shape},
                          {ddelta_bias, "ddelta_bias", p.partition, vector_shape},
                          {dinitial_state, "dinitial_state", p.partition, matrix_shape},
                          {dstate_offset, "dstate_offset", p.partition, matrix_shape},
                          {doutput_offset, "doutput_offset", p.partition, vector_shape}};
  p.dA = gradients[0].get(), p.dD = gradients[1].get(), p.ddelta_bias = gradients[2].get();
  p.dinitial_state = gradients[3].get(), p.dstate_offset = gradients[4].get(), p.doutput_offset = gradients[5].get();

  run(kernels().selective_scan_bwd, p, 2 * p.batch * p.dim * p.seqlen * p.dstate);
  if (p.dBC) reduce_dBC(p, p.dBC, dB_target, dC_target);
  for (const Gradient& gradient : gradients) gradient.finish();
}

// ---- one step ------------------------------------------------------------------------------------------------------

template <typename Update, typename Params>
void run_update(Update update, const Params& p, int64_t work) {
  const int64_t units = (p.dim + Partition::kUnit - 1) / Partition::kUnit, tasks = p.batch * units;
  parallel_for(0, tasks, grain(tasks, work), [&](int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t channel = task % units * Partition::kUnit;
      update(p, task / units, channel, std::min(channel + Partition::kUnit, p.dim));
    }
  });
}

// A tensor that is overwritten in place.
void check_not_expanded(const Tensor& x, const char* name) {
  for (int64_t axis = 0; axis < x.dim(); ++axis) {
    STD_TORCH_CHECK(x.size(axis) <= 1 || x.stride(axis) != 0, name, " is expanded");
  }
}

// Hands out contiguous memory of tensors, copying those that are not, or not of the dtype asked for; the copies live as long
// as this does.
class Contiguous {
 public:
  const void* get(const Tensor& x, const char* name, const Shape& shape, ScalarType dtype) {
    check_shape(x, name, shape);
    if (x.scalar_type() == dtype && x.is_contiguous()) return x.data_ptr();
    return copy(x, name, shape, dtype).data_ptr();
  }
  const Tensor& copy(const Tensor& x, const char* name, const Shape& shape, ScalarType dtype) {
    check_shape(x, name, shape);
    if (x.scalar_type() != ScalarType::Double) dtype_of(x, name);
    copies_.push_back(torch::stable::contiguous(x.scalar_type() == dtype ? x : torch::stable::to(x, dtype)));
    return copies_.back();
  }
  const void* get(const OptionalTensor& x, const char* name, const Shape& shape, ScalarType dtype) {
    return x ? get(*x, name, shape, dtype) : nullptr;
  }
  const float* get(const OptionalTensor& x, const char* name, const Shape& shape) {
    return static_cast<const float*>(get(x, name, shape, ScalarType::Float));
  }
  ChannelParameter channel_parameter(const OptionalTensor& x, const char* name, int64_t batch, Shape shape) {
    if (!x) return {};
    int64_t row = 1;
    for (const int64_t size : shape) row *= size;
    const bool shared = x->dim() == static_cast<int64_t>(shape.size());
    if (!shared) shape.insert(shape.begin(), batch);
    return {get(x, name, shape), shared ? 0 : row};
  }

 private:
  std::vector<Tensor> copies_;
};

Tensor selective_state_update(const Tensor& state, const Tensor& x, const Tensor& dt, const Tensor& A, const Tensor& B,
                              const Tensor& C, const OptionalTensor& D, const OptionalTensor& z, const OptionalTensor& dt_bias,
                              bool dt_softplus, const OptionalTensor& state_offset, const OptionalTensor& output_offset) {
  STD_TORCH_CHECK(state.dim() == 3, "state must have shape (batch, dim, dstate)");
  SelectiveStateUpdate p{};
  p.batch = state.size(0), p.dim = state.size(1), p.dstate = state.size(2);
  check_sizes({p.batch, p.dim, p.dstate});
  p.dtype = dtype_of(x, "x");
  const Shape channel_shape{p.batch, p.dim}, state_shape{p.batch, p.dstate};
  const Shape full_shape{p.batch, p.dim, p.dstate};
  Contiguous memory;
  const bool in_place = state.scalar_type() == ScalarType::Float && state.is_contiguous();
  check_not_expanded(state, "state");
  Tensor work = in_place ? state : memory.copy(state, "state", full_shape, ScalarType::Float);
  p.state = contiguous(work, "state", full_shape);
  const ScalarType dtype = x.scalar_type();
  const Tensor out = torch::stable::new_empty(x, {p.batch, p.dim});
  p.x = memory.get(x, "x", channel_shape, dtype);
  p.dt = memory.get(dt, "dt", channel_shape, dtype);
  p.z = memory.get(z, "z", channel_shape, dtype);
  p.B = memory.get(B, "B", state_shape, dtype);
  p.C = memory.get(C, "C", state_shape, dtype);
  p.A = memory.get(A, "A", {p.dim, p.dstate});
  p.D = memory.get(D, "D", {p.dim});
  p.dt_bias = memory.get(dt_bias, "dt_bias", {p.dim});
  p.dt_softplus = dt_softplus;
  p.state_offset = memory.channel_parameter(state_offset, "state_offset", p.batch, {p.dim, p.dstate});
  p.output_offset = memory.channel_parameter(output_offset, "output_offset", p.batch, {p.dim});
  p.out = out.data_ptr();
  run_update(kernels().selective_state_update, p, p.batch * p.dim * p.dstate);
  if (!in_place) {
    Tensor target = state;
    torch::stable::copy_(target, work);
  }
  return out;
}

// ---- causal convolution --------------------------------------------------------------------------------------------

// Packed sequences may have very different lengths: there, tasks are ranges of channels first.
Partition make_conv_partition(int64_t sequences, int64_t dim, bool packed) {
  Partition partition = make_partition(packed ? 1 : sequences, dim, dim);
  if (packed) {
    partition.batch = sequences;
    partition.groups = std::min(sequences, std::max<int64_t>(1, 16 / partition.ranges));
  }
  return partition;
}

// `bounds` must outlive the parameters.
void fill_conv(CausalConv1dParams& p, const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
               const OptionalTensor& initial_states, const std::vector<int64_t>& bounds, bool silu) {
  STD_TORCH_CHECK(x.dim() == 3 && weight.dim() == 2, "x must have shape (batch, dim, seqlen) and weight (dim, width)");
  p.dim = x.size(1), p.seqlen = x.size(2), p.width = weight.size(1);
  check_sizes({x.size(0), p.dim, p.seqlen, p.width});
  p.bounds = bounds.empty() ? nullptr : bounds.data();
  const int64_t sequences = p.bounds ? static_cast<int64_t>(bounds.size()) - 1 : x.size(0);
  p.partition = make_conv_partition(sequences, p.dim, p.bounds);
  p.x = sequence(x, "x", {x.size(0), p.dim, p.seqlen}, dtype_of(x, "x"));
  p.weight = contiguous(weight, "weight", {p.dim, p.width});
  p.bias = contiguous(bias, "bias", {p.dim});
  p.initial_states = contiguous(initial_states, "initial_states", {sequences, p.dim, p.width - 1});
  p.silu = silu;
}

// The states after each sequence; with a width of 1 there are none.
SequenceTensor final_states(const OptionalTensor& x, const char* name, const CausalConv1dParams& p) {
  if (!x || p.width == 1) return {};
  return sequence(x, name, {p.partition.batch, p.dim, p.width - 1}, p.x.dtype);
}

void causal_conv1d_fwd(const Tensor& x, const Tensor& weight, const OptionalTensor& bias, const OptionalTensor& initial_states,
                       const OptionalTensor& cu_seqlens, bool silu, const Tensor& out, const OptionalTensor& final_states_out) {
  CausalConv1dForward p{};
  const std::vector<int64_t> bounds = sequence_bounds("causal_conv1d", cu_seqlens, x.size(0), x.size(-1));
  fill_conv(p, x, weight, bias, initial_states, bounds, silu);
  p.out = result(out, "out", {x.size(0), p.dim, p.seqlen}, p.x.dtype);
  p.final_states = final_states(final_states_out, "final_states", p);
  run(kernels().causal_conv1d_fwd, p, x.size(0) * p.dim * p.seqlen);
}

void causal_conv1d_bwd(const Tensor& dout, const OptionalTensor& dfinal_states, const Tensor& x, const Tensor& weight,
                       const OptionalTensor& bias, const OptionalTensor& initial_states, const OptionalTensor& cu_seqlens,
                       bool silu, const OptionalTensor& dx, const OptionalTensor& dweight, const OptionalTensor& dbias,
                       const OptionalTensor& dinitial_states) {
  CausalConv1dBackward p{};
  const std::vector<int64_t> bounds = sequence_bounds("causal_conv1d", cu_seqlens, x.size(0), x.size(-1));
  fill_conv(p, x, weight, bias, initial_states, bounds, silu);
  const Shape sequence_shape{x.size(0), p.dim, p.seqlen};
  p.dout = sequence(dout, "dout", sequence_shape, p.x.dtype);
  p.dx = result(dx, "dx", sequence_shape, p.x.dtype);
  p.dfinal_states = final_states(dfinal_states, "dfinal_states", p);
  p.dinitial_states = contiguous(dinitial_states, "dinitial_states", {p.partition.batch, p.dim, p.width - 1});
  Gradient weight_gradient(dweight, "dweight", p.partition, {p.dim, p.width});
  Gradient bias_gradient(dbias, "dbias", p.partition, {p.dim});
  p.dweight = weight_gradient.get();
  p.dbias = bias_gradient.get();
  run(kernels().causal_conv1d_bwd, p, 2 * x.size(0) * p.dim * p.seqlen);
  weight_gradient.finish();
  bias_gradient.finish();
}

StridedTensor strided(const Tensor& x, const char* name, const Shape& shape) {
  check_shape(x, name, shape);
  StridedTensor tensor{x.data_ptr(), dtype_of(x, name), {}};
  for (size_t axis = 0; axis < shape.size(); ++axis) tensor.strides[axis] = x.stride(axis);
  return tensor;
}

Tensor causal_conv1d_update(const Tensor& x, const Tensor& conv_state, const Tensor& weight, const OptionalTensor& bias,
                            bool silu) {
  STD_TORCH_CHECK(x.dim() == 2 && weight.dim() == 2, "x must have shape (batch, dim) and weight (dim, width)");
  CausalConv1dUpdate p{};
  p.batch = x.size(0), p.dim = x.size(1), p.width = weight.size(1);
  check_sizes({p.batch, p.dim, p.width});
  const Tensor out = torch::stable::new_empty(x, {p.batch, p.dim});
  p.x = strided(x, "x", {p.batch, p.dim});
  p.out = strided(out, "out", {p.batch, p.dim});
  p.state = strided(conv_state, "conv_state", {p.batch, p.dim, p.width - 1});
  check_not_expanded(conv_state, "conv_state");
  p.weight = strided(weight, "weight", {p.dim, p.width});
  if (bias) p.bias = strided(*bias, "bias", {p.dim});
  p.silu = silu;
  run_update(kernels().causal_conv1d_update, p, p.batch * p.dim * p.width);
  return out;
}

std::string cpu_capability() { return kernels().capability; }

}  // namespace
}  // namespace ssmtune

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
      "selective_state_update(Tensor(a!) state, Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, "
      "Tensor? dt_bias, bool dt_softplus, Tensor? state_offset, Tensor? output_offset) -> Tensor");
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

STABLE_TORCH_LIBRARY_IMPL(ssmtune_native, CPU, m) {
  m.impl("selective_scan_fwd", TORCH_BOX(&ssmtune::selective_scan_fwd));
  m.impl("selective_scan_bwd", TORCH_BOX(&ssmtune::selective_scan_bwd));
  m.impl("selective_state_update", TORCH_BOX(&ssmtune::selective_state_update));
  m.impl("causal_conv1d_fwd", TORCH_BOX(&ssmtune::causal_conv1d_fwd));
  m.impl("causal_conv1d_bwd", TORCH_BOX(&ssmtune::causal_conv1d_bwd));
  m.impl("causal_conv1d_update", TORCH_BOX(&ssmtune::causal_conv1d_update));
}

STABLE_TORCH_LIBRARY_IMPL(ssmtune_native, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_BOX(&ssmtune::cpu_capability));
}
