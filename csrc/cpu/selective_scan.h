// What the forward and the backward scan share: parameters laid out for the lanes, and the rows of B and C.
#pragma once

#include "cpu/tile.h"

namespace ssmtune::SSMTUNE_CPU_CAPABILITY {

// Per-channel matrices and vectors of one task, a block of kLanes channels after the other: (blocks, padded states, lanes)
// and (blocks, lanes). Padded states have A = 0 and start from zero; as B and C are zero there too, they stay zero.
class ChannelBlocks {
 public:
  ChannelBlocks(const SelectiveScanParams& p, int64_t task)
      : channel_begin_(p.partition.channel_begin(task)), channel_end_(p.partition.channel_end(task)),
        section_(p.partition.section(task)), section_begin_(section_ * p.partition.section_size()),
        section_end_(section_begin_ + p.partition.section_size()), dstate_(p.dstate),
        matrix_size_(p.padded_states() * kLanes) {}

  int64_t section() const { return section_; }
  int64_t count() const { return (channel_end_ - channel_begin_ + kLanes - 1) / kLanes; }
  int64_t channel(int64_t block) const { return channel_begin_ + block * kLanes; }
  int64_t lanes(int64_t block) const { return lanes_left(channel(block), channel_end_); }
  int64_t matrix_size() const { return matrix_size_; }

  // Where the work goes on after the tile `at`: at `block` or, past the last one, at the first of the next chunk, `chunk_step`
  // steps forward or back. Without lanes if the row has no such chunk.
  TilePosition next_tile(const Row& row, const TilePosition& at, int64_t block, int64_t chunk_step) const {
    if (block < count()) return {at.batch, channel(block), lanes(block), at.time, at.steps};
    const int64_t time = at.time + chunk_step;
    return {at.batch, channel(0), time >= row.begin && time < row.end ? lanes(0) : 0, time, at.steps};
  }

  // Where chunk_states keeps the state of a block after a chunk: (dstate, lanes).
  float* chunk_state(const SelectiveScanParams& p, int64_t chunk, int64_t block) const {
    const int64_t kept = p.kept_channels(), section = section_ * (kept / p.partition.sections);
    return p.chunk_states + (chunk * kept + section + channel(block) - section_begin_) * dstate_;
  }
  // The channels of its padding that no block covers: a result holds no memory left unwritten.
  void clear_padding(const SelectiveScanParams& p, int64_t chunk) const {
    const int64_t covered = channel(count()), padded = section_begin_ + p.kept_channels() / p.partition.sections;
    if (covered >= section_end_ && covered < padded) fill_zero(chunk_state(p, chunk, count()), (padded - covered) * dstate_);
  }
  void clear_chunk(const SelectiveScanParams& p, int64_t chunk) const {
    fill_zero(chunk_state(p, chunk, 0), count() * kLanes * dstate_);
    clear_padding(p, chunk);
  }

  void pack_matrix(const float* source, float* packed) const {
    for (int64_t i = 0; i < count(); ++i) {
      float* const tile = packed + i * matrix_size_;
      read_matrix(source, dstate_, channel(i), lanes(i), tile);
      fill_zero(tile + dstate_ * kLanes, matrix_size_ - dstate_ * kLanes);
    }
  }
  void unpack_matrix(const float* packed, float* target) const {
    for (int64_t i = 0; i < count(); ++i) {
      write_matrix(target, dstate_, channel(i), lanes(i), packed + i * matrix_size_);
    }
  }
  // Without a source the values are zero.
  void pack_vector(const float* source, float* packed) const {
    for (int64_t i = 0; i < count(); ++i) {
      store(packed + i * kLanes, source ? load_first(source + channel(i), lanes(i)) : Vec{});
    }
  }
  void unpack_vector(const float* packed, float* target) const {
    for (int64_t i = 0; i < count(); ++i) {
      store_first(target + channel(i), load(packed + i * kLanes), lanes(i));
    }
  }

  // A as the exponent wants it, in powers of two, and its smallest and largest value for each channel.
  void pack_decay(const float* A, float* packed, float* smallest, float* largest) const {
    pack_matrix(A, packed);
    for (int64_t i = 0; i < count(); ++i) {
      Vec low{}, high{};
      for (int64_t at = i * matrix_size_; at < (i + 1) * matrix_size_; at += kLanes) {
        const Vec a = load(packed + at) * kLog2e;
        store(packed + at, a);
        low = select(a < low, a, low);
        high = select(a > high, a, high);
      }
      store(smallest + i * kLanes, low);
      store(largest + i * kLanes, high);
    }
  }
  // Whether a state of the block could grow: not if A <= 0 and the steps, coming from softplus, are positive.
  bool may_grow(const SelectiveScanParams& p, const float* largest, int64_t block) const {
    bool grows = !p.delta_softplus;
    for (int64_t i = 0; i < kLanes; ++i) grows |= largest[block * kLanes + i] > 0.0f;
    return grows;
  }

 private:
  int64_t channel_begin_, channel_end_, section_, section_begin_, section_end_, dstate_, matrix_size_;
};

// The step as the exponent wants it where a state may grow: one that grows by more than 2^127 in a step, past the range of
// exp2 and of fp32, becomes a NaN.
SSMTUNE_INLINE Vec bounded_step(Vec dt, Vec smallest_decay, Vec largest_decay) {
  const IntVec overflows = (dt * smallest_decay > 127.0f) | (dt * largest_decay > 127.0f);
  return select(overflows, broadcast(__builtin_nanf("")), dt);
}

// B or C over one chunk: rows of floats, the states next to each other and padded with zeros to whole groups.
struct StateRows {
  const float* data;
  int64_t stride;

  const float* operator[](int64_t step) const { return data + step * stride; }
};

inline int64_t state_rows_floats(const SelectiveScanParams& p) { return kChunk * round_up(p.dstate, 16); }

// Those of the section of channels whose group of B and C they are.
inline StateRows state_rows(const SelectiveScanParams& p, const StateTensor& states, int64_t section, int64_t batch,
                            int64_t time, int64_t steps, float* buffer) {
  SequenceTensor x = states;
  x.data = static_cast<char*>(x.data) + section * states.group_stride * (x.dtype == DType::kFloat32 ? 4 : 2);
  if (x.channels_last && x.dtype == DType::kFloat32 && p.dstate % kStateGroup == 0) {
    return {static_cast<const float*>(x.data) + batch * x.batch_stride + time * x.stride, x.stride};
  }
  const int64_t stride = round_up(p.dstate, 16);
  for (int64_t n = 0; n < p.padded_states(); n += kLanes) {
    const int64_t lanes = lanes_left(n, p.dstate);
    read_tile(x, {batch, n, lanes > 0 ? lanes : 0, time, steps}, buffer + n, stride);
  }
  return {buffer, stride};
}

}  // namespace ssmtune::SSMTUNE_CPU_CAPABILITY
