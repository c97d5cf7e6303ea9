// Tiles: some steps of kLanes neighbouring channels, as rows of floats with the channels in the lanes.
#pragma once

#include "cpu/params.h"
#include "cpu/vec.h"

namespace ssmtune::SSMTUNE_CPU_CAPABILITY {

// Which part of a SequenceTensor a tile is. Lanes from `lanes` on lie past the last channel: they are read as zero and
// not written.
struct TilePosition {
  int64_t batch, channel, lanes, time, steps;
};

void read_tile(const SequenceTensor& x, const TilePosition& at, float* tile, int64_t tile_stride);
void write_tile(const SequenceTensor& x, const TilePosition& at, const float* tile, int64_t tile_stride);

// Rows of a tile: in the tensor itself where its memory already has that form, else in a buffer.
template <typename T>
struct Rows {
  T* data;
  int64_t stride;
  bool direct;

  T* operator[](int64_t step) const { return data + step * stride; }
};

template <typename T>
inline constexpr DType kDType = DType::kFloat32;
template <>
inline constexpr DType kDType<BFloat16> = DType::kBFloat16;
template <>
inline constexpr DType kDType<Float16> = DType::kFloat16;

template <typename T = float>
SSMTUNE_INLINE bool is_direct(const SequenceTensor& x, const TilePosition& at) {
  return x.channels_last && x.dtype == kDType<T> && at.lanes == kLanes;
}
template <typename T = float>
SSMTUNE_INLINE T* address(const SequenceTensor& x, const TilePosition& at) {
  return static_cast<T*>(x.data) + at.batch * x.batch_stride + at.time * x.stride + at.channel;
}

// The type all rows of a tile are worked on in: that of the tensors if each of them that is there has the form of rows, which
// are then converted on the fly; else float, and buffers for those that do not.
template <int kTensors>
SSMTUNE_INLINE DType rows_dtype(const SequenceTensor* const (&tensors)[kTensors], const TilePosition& at) {
  DType dtype = DType::kFloat32;
  for (const SequenceTensor* x : tensors) {
    if (!x->data) continue;
    if (!x->channels_last || at.lanes != kLanes) return DType::kFloat32;
    dtype = x->dtype;
  }
  return dtype;
}

// Rows of a tensor that may be missing. Those of 16 bits lie in the tensor itself.
template <typename T = float>
SSMTUNE_INLINE Rows<const T> input_rows(const SequenceTensor& x, const TilePosition& at, [[maybe_unused]] float* buffer) {
  if (!x.data) return {};
  if constexpr (kDType<T> == DType::kFloat32) {
    if (!is_direct(x, at)) {
      read_tile(x, at, buffer, kLanes);
      return {buffer, kLanes, false};
    }
  }
  return {address<T>(x, at), x.stride, true};
}

// Rows to write to; those that are a buffer reach the tensor in finish_rows. Without a tensor they are only a buffer.
template <typename T = float>
SSMTUNE_INLINE Rows<T> output_rows(const SequenceTensor& x, const TilePosition& at, float* buffer) {
  if (x.data && is_direct<T>(x, at)) return {address<T>(x, at), x.stride, true};
  return {reinterpret_cast<T*>(buffer), kLanes, false};
}
template <typename T>
SSMTUNE_INLINE void finish_rows(const SequenceTensor& x, const TilePosition& at, const Rows<T>& rows) {
  if constexpr (kDType<T> == DType::kFloat32) {
    if (x.data && !rows.direct) write_tile(x, at, rows.data, rows.stride);
  }
}

// Fetches the tiles that are needed next, a few lines at each step of the loop over this one: rows of a tile lie too far
// apart for the hardware to see a pattern, and all at once they would wait for each other.
template <int kTensors>
class Prefetch {
 public:
  // The tile `at` of tensors that may be missing, and memory read or written from `block` on. A position without lanes is
  // none, and so is a null block.
  Prefetch(const SequenceTensor* const (&tensors)[kTensors], const TilePosition& at, const float* block = nullptr) {
    lines_[kTensors] = block ? Lines{reinterpret_cast<const char*>(block), kLine, kLine, 0} : none();
    for (int i = 0; i < kTensors; ++i) {
      const SequenceTensor& x = *tensors[i];
      if (!x.data || at.lanes <= 0) {
        lines_[i] = none();
        continue;
      }
      const int64_t size = x.dtype == DType::kFloat32 ? 4 : 2, stride = x.stride * size;
      const int64_t first = x.channels_last ? at.time * x.stride + at.channel : at.channel * x.stride + at.time;
      const char* const data = static_cast<const char*>(x.data) + (at.batch * x.batch_stride + first) * size;
      const int64_t last_line = kChunk * size / kLine - 1;  // of a channel in a chunk
      if (x.channels_last) {
        lines_[i] = {data, 0, stride, 0};
      } else {
        lines_[i] = {data, kLine, stride - last_line * kLine, last_line};
      }
    }
  }

  SSMTUNE_INLINE void step(int64_t t) {
    SSMTUNE_UNROLL
    for (Lines& lines : lines_) {
      __builtin_prefetch(lines.next);
      lines.next += (t & lines.mask) == lines.mask ? lines.outer : lines.inner;
    }
  }

 private:
  static constexpr int64_t kLine = 64;
  struct Lines {
    const char* next;
    int64_t inner, outer;  // to the next line; and after every mask + 1 lines
    int64_t mask;
  };
  Lines none() const { return {reinterpret_cast<const char*>(this), 0, 0, 0}; }

  Lines lines_[kTensors + 1];
};

// A (channels, columns) matrix is a sequence of its columns with the columns next to each other.
SSMTUNE_INLINE SequenceTensor matrix(const float* data, int64_t columns) {
  return {const_cast<float*>(data), DType::kFloat32, false, 0, columns};
}
// Reads kLanes rows of it as `columns` vectors; rows past the last one are zero.
SSMTUNE_INLINE void read_matrix(const float* data, int64_t columns, int64_t row, int64_t lanes, float* tile) {
  read_tile(matrix(data, columns), {0, row, lanes, 0, columns}, tile, kLanes);
}
SSMTUNE_INLINE void write_matrix(float* data, int64_t columns, int64_t row, int64_t lanes, const float* tile) {
  write_tile(matrix(data, columns), {0, row, lanes, 0, columns}, tile, kLanes);
}

SSMTUNE_INLINE int64_t lanes_left(int64_t channel, int64_t channels) {
  return channels - channel < kLanes ? channels - channel : kLanes;
}

// Without a count there need not be memory.
SSMTUNE_INLINE void fill_zero(float* p, int64_t count) {
  if (count > 0) __builtin_memset(p, 0, count * sizeof(float));
}
SSMTUNE_INLINE void copy(float* to, const float* from, int64_t count) {
  if (count > 0) __builtin_memcpy(to, from, count * sizeof(float));
}

// Hands out pieces of scratch memory; without memory it only adds up how much is needed. Pieces of equal size start one cache
// line further each, so that the same row of several tiles does not fall on the same cache set.
class Arena {
 public:
  explicit Arena(float* memory) : memory_(memory) {}
  float* take(int64_t count) {
    float* piece = memory_ ? memory_ + used_ : nullptr;
    used_ += round_up(count, kCacheLine) + kCacheLine;
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  static constexpr int64_t kCacheLine = 16;  // floats
  float* memory_;
  int64_t used_ = 0;
};

}  // namespace ssmtune::SSMTUNE_CPU_CAPABILITY
