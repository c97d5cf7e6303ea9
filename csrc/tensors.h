// Arguments of operators, checked, and as the kernels take them. Nothing here asks where a tensor lies: a CPU kernel is
// reached with CPU tensors alone, for one that lies elsewhere would have taken the call there.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <vector>

#include "cpu/params.h"

namespace ssmtune {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;
using Shape = std::vector<int64_t>;

void check_shape(const Tensor& x, const char* name, const Shape& shape);
void check_sizes(std::initializer_list<int64_t> sizes);
// A tensor that is overwritten in place.
void check_not_expanded(const Tensor& x, const char* name);

DType dtype_of(const Tensor& x, const char* name);

// A (batch, channels, time) tensor of any of the two layouts.
SequenceTensor sequence(const Tensor& x, const char* name, const Shape& shape, DType dtype);
SequenceTensor sequence(const OptionalTensor& x, const char* name, const Shape& shape, DType dtype);

// A sequence tensor that is about to be written, by the CPU.
SequenceTensor result(const OptionalTensor& x, const char* name, const Shape& shape, DType dtype);

// B or C: (batch, states, time), or (batch, groups, states, time).
StateTensor states(const Tensor& x, const char* name, Shape shape, int64_t groups, DType dtype);

// Where packed sequences start, and where the last one ends: they must cut up the steps, or a kernel would reach past them, and
// a compiled graph gets here without any other check. Empty without cu_seqlens.
std::vector<int64_t> sequence_bounds(const char* op, const OptionalTensor& cu_seqlens, int64_t batch, int64_t seqlen);

float* contiguous(const Tensor& x, const char* name, const Shape& shape);
float* contiguous(const OptionalTensor& x, const char* name, const Shape& shape);

// A parameter of `shape`, or one for each row of the batch.
ChannelParameter channel_parameter(const OptionalTensor& x, const char* name, int64_t batch, Shape shape);

StridedTensor strided(const Tensor& x, const char* name, const Shape& shape);

}  // namespace ssmtune
