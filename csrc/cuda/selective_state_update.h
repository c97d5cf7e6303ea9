// What the CUDA kernel of one decoding step is called with. Free of torch and of CUDA: sizes and strides are in elements.
#pragma once

#include <bit>
#include <cstdint>

#include "cpu/params.h"

namespace ssmtune::cuda {

// A tensor whose last axis is contiguous.
struct Rows {
  const void* data = nullptr;
  int64_t stride = 0;        // from row to row of the batch
  int64_t group_stride = 0;  // from group to group of B and C
};

// Which entry of the stacks of offsets each row of the batch reads: one that is not there for none. Null without stacks.
struct AdapterIndex {
  const void* data = nullptr;
  bool wide = false;  // int64, not int32
  int64_t adapters = 0;
};

struct SelectiveStateUpdate {
  int64_t batch, dim, dstate, groups;
  DType dtype;      // of x, dt, z, B, C and out
  float* state;     // (batch, dim, dstate)
  Rows x, dt, z;    // (batch, dim)
  Rows B, C;        // (batch, groups, dstate): a group serves dim / groups channels
  const float *A;   // (dim, dstate)
  const float *D, *dt_bias;  // (dim,)
  bool dt_softplus;
  ChannelParameter state_offset, output_offset;  // with an adapter index stacks of them, batch_stride from entry to entry
  AdapterIndex adapter_index;
  void* out;  // (batch, dim)
};

// The states of a channel are spread over `lanes` neighbouring threads, which take `vector` of them at a time.
struct StateUpdateLayout {
  static constexpr int kThreads = 128;

  int vector, lanes, block_channels;
  unsigned channel_blocks, group_channels;
  int64_t batch;

  int64_t blocks() const { return int64_t{channel_blocks} * batch; }
};

StateUpdateLayout layout(const SelectiveStateUpdate& p);

int selective_state_update(const SelectiveStateUpdate& p, void* stream);

}  // namespace ssmtune::cuda
