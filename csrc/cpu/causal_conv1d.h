// What the forward and the backward convolution share.
#pragma once

#include "cpu/params.h"
#include "cpu/tile.h"

namespace ssmtune::SSMTUNE_CPU_CAPABILITY {

// The task's channels in blocks of kLanes, with weight and bias as vectors: (blocks, width, lanes) and (blocks, lanes).
struct Channels {
  Channels(const CausalConv1dParams& p, int64_t task)
      : begin(p.partition.channel_begin(task)), end(p.partition.channel_end(task)) {}

  int64_t count() const { return (end - begin + kLanes - 1) / kLanes; }
  int64_t channel(int64_t block) const { return begin + block * kLanes; }
  int64_t lanes(int64_t block) const { return lanes_left(channel(block), end); }

  void pack(const CausalConv1dParams& p, float* weight, float* bias) const {
    fill_zero(weight, count() * p.width * kLanes);
    fill_zero(bias, count() * kLanes);
    if (p.bias) copy(bias, p.bias + begin, end - begin);
    for (int64_t i = 0; i < end - begin; ++i) {
      float* const lane = weight + i / kLanes * p.width * kLanes + i % kLanes;
      for (int64_t k = 0; k < p.width; ++k) lane[k * kLanes] = p.weight[(begin + i) * p.width + k];
    }
  }
  // Writes what has the form of packed weights to a (dim, width) tensor, unless that is null.
  void unpack(const CausalConv1dParams& p, const float* packed, float* target) const {
    if (!target) return;
    for (int64_t i = 0; i < end - begin; ++i) {
      const float* const lane = packed + i / kLanes * p.width * kLanes + i % kLanes;
      for (int64_t k = 0; k < p.width; ++k) target[(begin + i) * p.width + k] = lane[k * kLanes];
    }
  }

  int64_t begin, end;
};

// The steps [from, to) of the sequence [begin, end), whose rows of the states before it and after it are at `index`.
struct Piece {
  int64_t batch, index, begin, end, from, to;
};

template <typename Function>
SSMTUNE_INLINE void for_each_piece(const CausalConv1dParams& p, int64_t task, const Function& function) {
  for (int64_t row = p.partition.batch_begin(task); row < p.partition.batch_end(task); ++row) {
    const int64_t batch = row / p.pieces, i = row % p.pieces;
    const int64_t from = p.seqlen * i / p.pieces, to = p.seqlen * (i + 1) / p.pieces;
    if (!p.bounds) {
      function(Piece{batch, batch, 0, p.seqlen, from, to});
      continue;
    }
    for (int64_t index = 0; index < p.sequences; ++index) {
      const int64_t begin = p.bounds[index], end = p.bounds[index + 1];
      if (begin >= to || end <= from) continue;
      function(Piece{0, index, begin, end, begin > from ? begin : from, end < to ? end : to});
    }
  }
}

// The rows of x a tile needs: those of its steps and, before them, the width - 1 they look back to.
SSMTUNE_INLINE Rows<const float> rows_with_context(const CausalConv1dParams& p, const Piece& piece, const TilePosition& at,
                                                   float* buffer) {
  const int64_t context = p.width - 1, passed = at.time - piece.begin;
  const int64_t earlier = passed < context ? passed : context;
  TilePosition from = at;
  from.time -= earlier;
  from.steps += earlier;
  if (earlier == context && is_direct(p.x, at)) return {address(p.x, from), p.x.stride, true};
  const int64_t missing = context - earlier;
  if (p.initial_states) {
    const float* const states = p.initial_states + piece.index * p.dim * context;
    read_tile(matrix(states, context), {0, at.channel, at.lanes, passed, missing}, buffer, kLanes);
  } else {
    fill_zero(buffer, missing * kLanes);
  }
  read_tile(p.x, from, buffer + missing * kLanes, kLanes);
  return {buffer, kLanes, false};
}

// Width 0 stands for one known at run time only.
template <int kWidth>
SSMTUNE_INLINE Vec convolve(const Rows<const float>& x, int64_t t, const float* weight, Vec bias, int64_t width) {
  Vec y = bias;
  if constexpr (kWidth > 0) width = kWidth;
  SSMTUNE_UNROLL
  for (int64_t k = 0; k < width; ++k) y += load(weight + k * kLanes) * load(x[t + k]);
  return y;
}

// ---- whole rows ----------------------------------------------------------------------------------------------------

// Channels-last tensors are worked on a few steps at a time, and there from channel to channel: memory is read and written in
// the order in which it lies, and a line that holds two blocks of a 16-bit type is still there for the second one. The steps
// that look back to before their sequence are left to tiles.

// How many of the task's blocks, from the first on, can be worked on in rows.
template <int kTensors>
SSMTUNE_INLINE int64_t blocks_in_rows(const CausalConv1dParams& p, const SequenceTensor* const (&tensors)[kTensors],
                                      const Channels& channels) {
  if (p.width < 2 || p.width > 4) return 0;
  for (const SequenceTensor* x : tensors) {
    if (x->data && !x->channels_last) return 0;
  }
  return (channels.end - channels.begin) / kLanes;
}

// The first step of a piece that looks at steps of its sequence alone.
SSMTUNE_INLINE int64_t first_step_in_rows(const CausalConv1dParams& p, const Piece& piece) {
  const int64_t first = piece.begin + p.width - 1;
  return first < piece.from ? piece.from : first < piece.to ? first : piece.to;
}

}  // namespace ssmtune::SSMTUNE_CPU_CAPABILITY
