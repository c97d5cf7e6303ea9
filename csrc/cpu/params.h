// What the CPU kernels are called with. Free of torch: plain pointers, sizes and strides in elements.
#pragma once

#include "kernel_tensors.h"

namespace ssmtune {

// The gradient of such a parameter. A shared one is written once per batch group, at data + group * group_stride, and the
// caller adds the groups up; one per row is written at data + row * batch_stride.
struct ChannelGradient {
  float* data = nullptr;
  int64_t batch_stride = 0;
  int64_t group_stride = 0;
};

// Work is cut into groups * ranges tasks: some rows of the batch times some channels. The channels are `sections` of equal
// size, and no range reaches from one into the next. The cut depends on the arguments alone, not on the number of threads, and
// each task adds up its results in a fixed order: so results do not depend on it either.
struct Partition {
  static constexpr int64_t kUnit = 32;  // channels; a multiple of every kernel's block of channels

  int64_t batch, dim, groups, ranges;
  int64_t sections = 1;
  const int64_t* group_begin = nullptr;  // the first row of each group, and the end of the last; null for groups of equal size

  int64_t tasks() const { return groups * ranges; }
  int64_t group(int64_t task) const { return task / ranges; }
  int64_t range(int64_t task) const { return task % ranges; }
  int64_t batch_begin(int64_t task) const { return row(group(task)); }
  int64_t batch_end(int64_t task) const { return row(group(task) + 1); }
  int64_t section(int64_t task) const { return range(task) / section_ranges(); }
  int64_t section_size() const { return dim / sections; }
  int64_t section_ranges() const { return ranges / sections; }
  int64_t channel_begin(int64_t task) const { return boundary(task, 0); }
  int64_t channel_end(int64_t task) const { return boundary(task, 1); }
  int64_t units() const { return (section_size() + kUnit - 1) / kUnit; }  // of a section
  int64_t max_range_channels() const { return (units() + section_ranges() - 1) / section_ranges() * kUnit; }

 private:
  int64_t row(int64_t group) const { return group_begin ? group_begin[group] : batch * group / groups; }
  int64_t boundary(int64_t task, int64_t end) const {
    const int64_t channel = units() * (range(task) % section_ranges() + end) / section_ranges() * kUnit;
    return section(task) * section_size() + (channel < section_size() ? channel : section_size());
  }
};

// What is scanned at a time, the steps [begin, end) of a row of the batch: all of them, one of the sequences packed into the
// only row, or a segment.
struct Row {
  int64_t batch, begin, end;
};

// The forward scan keeps one state every kChunk steps; the backward scan recomputes the steps between.
inline constexpr int64_t kChunk = 32;
// Channels of chunk_states are padded to a multiple of this.
inline constexpr int64_t kChannelPadding = 16;
// States are worked on in groups of this many; missing ones are padded with zeros.
inline constexpr int64_t kStateGroup = 8;

inline constexpr int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

struct SelectiveScanParams {
  Partition partition;
  int64_t batch, dim, seqlen, dstate;
  int64_t rows;           // as many as sequences: the batch, or those packed into a batch of 1; segments times that many
  const int64_t* bounds;  // (rows + 1,): where packed sequences start, and where the last one ends; else null
  int64_t segments;       // rows that a sequence is cut into, by multiples of kChunk; 1 where sequences are packed
  SequenceTensor u, delta, z;
  StateTensor B, C;
  const float* A;           // (dim, dstate)
  const float* D;           // (dim,)
  const float* delta_bias;  // (dim,)
  ChannelParameter initial_state;  // of each row, or of each sequence in the backward scan
  ChannelParameter state_offset, output_offset;  // of each sequence
  bool delta_softplus;
  float* step_sums;  // (rows, dim), wanted where not null: the sum of dt over a row
  // (kept chunks, sections, padded section size / lanes, dstate, lanes): the state after each chunk but the last of a row
  float* chunk_states;

  int64_t sequence(int64_t r) const { return r / segments; }
  int64_t sequences() const { return rows / segments; }
  Row row(int64_t r) const {
    if (bounds) return {0, bounds[r], bounds[r + 1]};
    const int64_t end = segment_begin(r % segments + 1);
    return {sequence(r), segment_begin(r % segments), end < seqlen ? end : seqlen};
  }
  bool begins_sequence(const Row& row) const { return bounds || row.begin == 0; }
  bool ends_sequence(const Row& row) const { return bounds || row.end == seqlen; }
  // Where the chunks of row r are kept: of n steps, (n - 1) / kChunk. Packed sequences may leave one unused between them, so
  // that how many there are depends on shapes alone.
  int64_t first_chunk(int64_t r) const {
    if (bounds) return (bounds[r] - r) / kChunk;
    return sequence(r) * ((seqlen - 1) / kChunk) + segment_begin(r % segments) / kChunk;
  }
  int64_t kept_channels() const { return partition.sections * round_up(partition.section_size(), kChannelPadding); }
  int64_t padded_states() const { return round_up(dstate, kStateGroup); }

 private:
  int64_t segment_begin(int64_t i) const {
    const int64_t chunks = (seqlen + kChunk - 1) / kChunk;
    return (chunks * i + segments - 1) / segments * kChunk;
  }
};

struct SelectiveScanForward : SelectiveScanParams {
  SequenceTensor out;
  float* last_state;  // (rows, dim, dstate)
};

struct SelectiveScanBackward : SelectiveScanParams {
  SequenceTensor dout, du, ddelta, dz;
  const float* dlast_state;  // (rows, dim, dstate)
  float* dfirst_state;       // (rows, dim, dstate), wanted where not null: the gradient of the state before each row
  float* dBC;                // (batch, ranges, seqlen, 2, padded states): each range's share of dB and dC; or null
  ChannelGradient dA, dD, ddelta_bias, dinitial_state, dstate_offset, doutput_offset;
};

struct SelectiveStateUpdate {
  int64_t batch, dim, dstate, groups;
  DType dtype;
  float* state;  // (batch, dim, dstate)
  const void *x, *dt, *z;  // (batch, dim)
  const void *B, *C;       // (batch, groups, dstate): a group serves dim / groups channels
  const float* A;  // (dim, dstate), or (dim,) with one_decay: all states of a channel decay alike
  const float *D, *dt_bias;
  bool one_decay, dt_softplus;
  ChannelParameter state_offset, output_offset;
  const int64_t* adapter_of_row;  // (batch,): the row of the offsets that each row reads, -1 for none; null for its own
  void* out;                      // (batch, dim)
};

struct CausalConv1dParams {
  Partition partition;  // of pieces of the rows of the batch, and channels
  int64_t dim, seqlen, width;
  int64_t pieces;         // that each row of the batch is cut into along time
  int64_t sequences;      // the batch, or the sequences packed into a batch of 1
  const int64_t* bounds;  // (sequences + 1,): where packed sequences begin and end; null for one in each row of the batch
  SequenceTensor x;
  const float* weight;          // (dim, width)
  const float* bias;            // (dim,)
  const float* initial_states;  // (sequences, dim, width - 1), oldest step first
  bool silu;
};

struct CausalConv1dForward : CausalConv1dParams {
  SequenceTensor out;
  SequenceTensor final_states;  // (sequences, dim, width - 1)
};

struct CausalConv1dBackward : CausalConv1dParams {
  SequenceTensor dout, dx;
  SequenceTensor dfinal_states;  // (sequences, dim, width - 1)
  ChannelGradient dweight, dbias;
  float* dinitial_states;  // (sequences, dim, width - 1)
};

// A tensor of up to three axes in any memory: element (i, j, k) is at i * strides[0] + j * strides[1] + k * strides[2].
struct StridedTensor {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t strides[3] = {};
};

struct CausalConv1dUpdate {
  int64_t batch, dim, width;
  StridedTensor state;   // (batch, dim, width - 1), oldest step first
  StridedTensor x, out;  // (batch, dim)
  StridedTensor weight;  // (dim, width)
  StridedTensor bias;    // (dim,)
  bool silu;
};

}  // namespace ssmtune
