// What the kernels of Mamba-2's scan are called with. Free of torch: plain pointers, sizes and strides in elements.
#pragma once

#include "cpu/params.h"

namespace ssmtune {

// The scan takes kSsdChunk steps at a time as products of matrices, and keeps the states between chunks for the way back.
inline constexpr int64_t kSsdChunk = 64;

// A (batch, seqlen, heads, size) tensor, dense along its last two axes.
struct HeadTensor {
  void* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t batch_stride = 0;
  int64_t stride = 0;
};

struct SsdScanParams {
  Partition partition;  // of rows, and of heads: each counts as Partition::kUnit channels, a group of B and C is a section
  int64_t batch, seqlen, heads, headdim, groups, dstate;
  int64_t rows;           // as many as sequences: the batch, or those packed into a batch of 1
  const int64_t* bounds;  // (rows + 1,): where packed sequences start, and where the last one ends; else null
  HeadTensor x, B, C;
  const float* dt;       // (batch, seqlen, heads)
  const float* A;        // (heads,)
  const float* D;        // (heads, headdim)
  const float* dt_bias;  // (heads,)
  bool dt_softplus;
  float dt_min, dt_max;
  ChannelParameter initial_states, state_offset;  // of each row, (heads, headdim, dstate)
  ChannelParameter output_offset;                 // of each row, (heads, headdim)
  float* chunk_states;  // (batch, kept chunks, heads, headdim, dstate): the states before each chunk but the first of a row

  int64_t head_begin(int64_t task) const { return partition.channel_begin(task) / Partition::kUnit; }
  int64_t head_end(int64_t task) const { return partition.channel_end(task) / Partition::kUnit; }
  int64_t max_range_heads() const { return partition.max_range_channels() / Partition::kUnit; }
  Row row(int64_t r) const { return bounds ? Row{0, bounds[r], bounds[r + 1]} : Row{r, 0, seqlen}; }
  // Where the states of row r are kept: of n steps, (n - 1) / kSsdChunk.
  int64_t first_chunk(int64_t r) const { return bounds ? (bounds[r] - r) / kSsdChunk : r * ((seqlen - 1) / kSsdChunk); }
};

struct SsdScanForward : SsdScanParams {
  HeadTensor out;
  float* final_states;  // (rows, heads, headdim, dstate)
};

struct SsdScanBackward : SsdScanParams {
  HeadTensor dout, dx;
  const float* dfinal_states;  // (rows, heads, headdim, dstate)
  float* ddt;                  // (batch, seqlen, heads)
  float* dBC;                  // (batch, ranges, seqlen, 2, dstate): the shares of each range of heads in dB and dC
  ChannelGradient dA, dD, ddt_bias, dinitial_states, dstate_offset, doutput_offset;
};

}  // namespace ssmtune
