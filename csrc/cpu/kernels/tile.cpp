#include "cpu/tile.h"

namespace ssmtune::SSMTUNE_CPU_CAPABILITY {
namespace {

template <typename T>
T* element(const SequenceTensor& x, const TilePosition& at) {
  T* const row = static_cast<T*>(x.data) + at.batch * x.batch_stride;
  return x.channels_last ? row + at.time * x.stride + at.channel : row + at.channel * x.stride + at.time;
}

template <typename T>
void read(const SequenceTensor& x, const TilePosition& at, float* tile, int64_t tile_stride) {
  const T* source = element<const T>(x, at);
  if (x.channels_last) {
    for (int64_t t = 0; t < at.steps; ++t) {
      store(tile + t * tile_stride, load_first(source + t * x.stride, at.lanes));
    }
    return;
  }
  for (int64_t t = 0; t < at.steps; t += kLanes) {
    const int64_t steps = lanes_left(t, at.steps);
    Vec rows[kLanes];
    if (steps == kLanes && at.lanes == kLanes) {
      SSMTUNE_UNROLL
      for (int i = 0; i < kLanes; ++i) rows[i] = load(source + i * x.stride + t);
    } else {
      for (int i = 0; i < kLanes; ++i) rows[i] = i < at.lanes ? load_first(source + i * x.stride + t, steps) : Vec{};
    }
    transpose(rows);
    if (steps == kLanes) {
      SSMTUNE_UNROLL
      for (int i = 0; i < kLanes; ++i) store(tile + (t + i) * tile_stride, rows[i]);
    } else {
      for (int i = 0; i < steps; ++i) store(tile + (t + i) * tile_stride, rows[i]);
    }
  }
}

template <typename T>
void write(const SequenceTensor& x, const TilePosition& at, const float* tile, int64_t tile_stride) {
  T* target = element<T>(x, at);
  if (x.channels_last) {
    for (int64_t t = 0; t < at.steps; ++t) {
      store_first(target + t * x.stride, load(tile + t * tile_stride), at.lanes);
    }
    return;
  }
  for (int64_t t = 0; t < at.steps; t += kLanes) {
    const int64_t steps = lanes_left(t, at.steps);
    Vec rows[kLanes];
    if (steps == kLanes) {
      SSMTUNE_UNROLL
      for (int i = 0; i < kLanes; ++i) rows[i] = load(tile + (t + i) * tile_stride);
    } else {
      for (int i = 0; i < kLanes; ++i) rows[i] = i < steps ? load(tile + (t + i) * tile_stride) : Vec{};
    }
    transpose(rows);
    if (steps == kLanes && at.lanes == kLanes) {
      SSMTUNE_UNROLL
      for (int i = 0; i < kLanes; ++i) store(target + i * x.stride + t, rows[i]);
    } else {
      for (int i = 0; i < at.lanes; ++i) store_first(target + i * x.stride + t, rows[i], steps);
    }
  }
}

}  // namespace

void read_tile(const SequenceTensor& x, const TilePosition& at, float* tile, int64_t tile_stride) {
  switch (x.dtype) {
    case DType::kFloat32: return read<float>(x, at, tile, tile_stride);
    case DType::kBFloat16: return read<BFloat16>(x, at, tile, tile_stride);
    case DType::kFloat16: return read<Float16>(x, at, tile, tile_stride);
  }
}

void write_tile(const SequenceTensor& x, const TilePosition& at, const float* tile, int64_t tile_stride) {
  switch (x.dtype) {
    case DType::kFloat32: return write<float>(x, at, tile, tile_stride);
    case DType::kBFloat16: return write<BFloat16>(x, at, tile, tile_stride);
    case DType::kFloat16: return write<Float16>(x, at, tile, tile_stride);
  }
}

}  // namespace ssmtune::SSMTUNE_CPU_CAPABILITY
