#include "cpu/gemm.h"

namespace ssmtune::SSMTUNE_CPU_CAPABILITY {
namespace {

// Blocks of C that fill the registers: with AVX-512 24 of 32, else 12 of 16.
inline constexpr int kBlockRows = 6;
inline constexpr int kBlockVecs = kLanes == 16 ? 4 : 2;

using Block = void (*)(int64_t, Factor, const float*, int64_t, float, float*, int64_t);

template <int kRows, int kVecs>
void multiply(int64_t depth, Factor A, const float* B, int64_t B_row, float scale, float* C, int64_t C_row) {
  Vec sums[kRows][kVecs] = {};
  for (int64_t k = 0; k < depth; ++k) {
    Vec b[kVecs];
    SSMTUNE_UNROLL
    for (int v = 0; v < kVecs; ++v) b[v] = load(B + k * B_row + v * kLanes);
    SSMTUNE_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const float a = A.data[i * A.row + k * A.column];
      SSMTUNE_UNROLL
      for (int v = 0; v < kVecs; ++v) sums[i][v] += a * b[v];
    }
  }
  SSMTUNE_UNROLL
  for (int i = 0; i < kRows; ++i) {
    SSMTUNE_UNROLL
    for (int v = 0; v < kVecs; ++v) {
      float* const c = C + i * C_row + v * kLanes;
      store(c, scale == 0.0f ? sums[i][v] : scale * load(c) + sums[i][v]);
    }
  }
}

template <int... block>
Block block_of(int64_t rows, int64_t vecs, std::integer_sequence<int, block...>) {
  static constexpr Block kBlocks[] = {multiply<block / kBlockVecs + 1, block % kBlockVecs + 1>...};
  return kBlocks[(rows - 1) * kBlockVecs + vecs - 1];
}

}  // namespace

void gemm(int64_t rows, int64_t columns, int64_t depth, Factor A, const float* B, int64_t B_row, float scale, float* C,
          int64_t C_row) {
  for (int64_t j = 0; j < columns; j += kBlockVecs * kLanes) {
    const int64_t left = (columns - j) / kLanes, vecs = left < kBlockVecs ? left : kBlockVecs;
    for (int64_t i = 0; i < rows; i += kBlockRows) {
      const int64_t height = rows - i < kBlockRows ? rows - i : kBlockRows;
      const Block block = block_of(height, vecs, std::make_integer_sequence<int, kBlockRows * kBlockVecs>{});
      block(depth, {A.data + i * A.row, A.row, A.column}, B + j, B_row, scale, C + i * C_row + j, C_row);
    }
  }
}

void transpose(const float* source, int64_t source_row, int64_t rows, int64_t columns, float* target, int64_t target_row) {
  for (int64_t i = 0; i < rows; i += kLanes) {
    for (int64_t j = 0; j < columns; j += kLanes) {
      Vec x[kLanes];
      SSMTUNE_UNROLL
      for (int lane = 0; lane < kLanes; ++lane) x[lane] = load(source + (i + lane) * source_row + j);
      transpose(x);
      SSMTUNE_UNROLL
      for (int lane = 0; lane < kLanes; ++lane) store(target + (j + lane) * target_row + i, x[lane]);
    }
  }
}

}  // namespace ssmtune::SSMTUNE_CPU_CAPABILITY
