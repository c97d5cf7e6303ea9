// Products of small matrices of floats.
#pragma once

#include "cpu/vec.h"

namespace ssmtune::SSMTUNE_CPU_CAPABILITY {

// A matrix whose element (i, k) is at i * row + k * column: the transpose of another is that one with its strides exchanged.
struct Factor {
  const float* data;
  int64_t row, column;
};

// C = scale * C + A B for `rows` rows, `columns` columns, a multiple of kLanes, and sums over `depth` terms. Rows of B and C are
// `B_row` and `C_row` floats apart. With a scale of zero C need not hold numbers.
void gemm(int64_t rows, int64_t columns, int64_t depth, Factor A, const float* B, int64_t B_row, float scale, float* C,
          int64_t C_row);

// target (columns, rows) = source (rows, columns); both counts are multiples of kLanes.
void transpose(const float* source, int64_t source_row, int64_t rows, int64_t columns, float* target, int64_t target_row);

}  // namespace ssmtune::SSMTUNE_CPU_CAPABILITY
