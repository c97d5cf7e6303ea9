// The selective scan on CUDA: what a caller fills in, and how the work is laid out over a GPU. Free of torch and of CUDA:
// plain pointers to device memory, sizes and strides in elements.
#pragma once

#include <cstdint>

#include "kernel_tensors.h"

namespace ssmtune::cuda {

// The forward scan keeps one state every kChunk steps of a row; the backward scan recomputes the steps between.
inline constexpr int64_t kChunk = 32;
// Threads of a block, forward and, with so many states in each, backward: what they keep in shared memory grows with both.
inline constexpr int kScanThreads = 128;
constexpr int backward_threads(int64_t states) { return states == 4 ? 256 : 128; }

// Of a block, in bytes. GPUs of compute capability 8.0, 9.0 and 10.0 have more, smaller ones (8.6, 8.9, 12.0) less.
inline constexpr int kMostSharedBytes = 128 << 10;

struct SelectiveScanParams {
  int64_t batch, dim, seqlen, dstate;
  int64_t groups;         // of B and C: each serves dim / groups channels
  int64_t rows;           // the batch, or the sequences packed into a batch of 1
  const int64_t* bounds;  // (rows + 1,), in device memory: where packed sequences start, and where the last one ends; else null
  SequenceTensor u, delta, z;  // all sequence tensors have the dtype of u
  StateTensor B, C;
  const float* A;           // (dim, dstate)
  const float* D;           // (dim,)
  const float* delta_bias;  // (dim,)
  ChannelParameter initial_state, state_offset, output_offset;
  bool delta_softplus;
  float* chunk_states;  // (kept_chunks, dim, dstate): the state after each chunk but the last of a row; or null
  float* workspace;     // workspace_floats() of them, of any content

  // As many as there can be: packed sequences may leave some unused.
  int64_t kept_chunks() const { return bounds ? (seqlen - rows) / kChunk : batch * ((seqlen - 1) / kChunk); }
};

struct SelectiveScanForward : SelectiveScanParams {
  SequenceTensor out;
  float* last_state;  // (rows, dim, dstate)
};

// The gradient of a parameter of each channel: shared (batch_stride 0), or one for each row.
struct ParameterGradient {
  float* data = nullptr;
  int64_t batch_stride = 0;
};

// Null pointers stand for gradients that are not wanted. dlast_state and dout may be null as well.
struct SelectiveScanBackward : SelectiveScanParams {
  SequenceTensor dout, du, ddelta, dz;
  const float* dlast_state;  // (rows, dim, dstate)
  float *dB, *dC;            // (batch, groups, seqlen, dstate)
  float* dA;                 // (dim, dstate)
  float *dD, *ddelta_bias;   // (dim,)
  ParameterGradient dinitial_state, dstate_offset, doutput_offset;
};

// How a scan is cut into blocks of threads. It depends on shapes alone: so do the results, to the last bit, on every GPU.
//
// A channel's states are spread over `lanes` neighbouring threads, `states` for each. Where batch x dim cannot fill a GPU, time is
// cut into segments too: a first pass finds what each segment adds to the state (backward: to its adjoint), the segments are
// put together in order, and a second pass starts each from its true state.
struct ScanLayout {
  int64_t states, lanes;
  int64_t block_channels;  // of one block of threads
  int64_t section_channels, section_blocks;  // of one group of B and C: no block reaches into the next
  int64_t channel_blocks;  // of all groups
  int64_t row_groups;      // rows are dealt to this many, in turn; backward, each adds up its share of gradients that rows share
  int64_t segments;        // of each row

  int64_t padded_states() const { return states * lanes; }
  int64_t blocks() const { return channel_blocks * row_groups * segments; }
};

ScanLayout scan_layout(const SelectiveScanForward& p);
ScanLayout scan_layout(const SelectiveScanBackward& p);

// How much memory a call needs besides its tensors.
int64_t workspace_floats(const SelectiveScanForward& p);
int64_t workspace_floats(const SelectiveScanBackward& p);

// Start the kernels on a stream (a cudaStream_t); give a cudaError_t, 0 if all is well.
int selective_scan_fwd(const SelectiveScanForward& p, void* stream);
int selective_scan_bwd(const SelectiveScanBackward& p, void* stream);

}  // namespace ssmtune::cuda
