// What the CUDA kernels of the convolution are called with, and how their work is cut up. Free of torch and of CUDA: sizes and
// strides are in elements, a stream is a cudaStream_t, and what a launcher returns is a cudaError_t.
#pragma once

#include <cstdint>

#include "cpu/params.h"

namespace ssmtune::cuda {

// The kernels of sequences take filters of up to this width, and pad narrower ones with zeros.
inline constexpr int kFilter = 4;

struct CausalConv1dParams {
  int64_t batch, dim, seqlen, width;
  int64_t sequences;          // the batch, or the sequences packed into a batch of 1
  const int64_t* cu_seqlens;  // (sequences + 1,): where packed sequences begin and end; else null
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
  float* dweight;                // (dim, width)
  float* dbias;                  // (dim,)
  float* dinitial_states;        // (sequences, dim, width - 1)
  float* shares;                 // (tiles.shares(), kFilter + 1, dim): what each tile adds to dweight and dbias
};

// (batch, dim, seqlen) cut into tiles of `channels` and `steps`, one for each block.
struct ConvTiles {
  int vector;  // channels that a thread takes at once; 0 where the threads of a warp take steps of one channel
  int64_t channels, steps;
  int64_t channel_tiles, step_tiles, batch;

  int64_t blocks() const { return channel_tiles * step_tiles * batch; }
  // tiles of the same channels
  int64_t shares() const { return step_tiles * batch; }
};

// Warps of a block: they go through different steps of the same channels, or through different channels.
inline constexpr int kWarp = 32, kConvWarps = 8, kConvThreads = kWarp * kConvWarps;
// Channels of a thread, where they lie next to each other: 8 bytes of the half types, 16 of float.
inline constexpr int kConvVector = 4;
// Steps of such a thread. It reads kFilter - 1 more, and the backward pass computes as many gradients twice.
inline constexpr int kForwardSteps = 16, kBackwardSteps = 32;
// How often other threads go on to the next steps; each time, the backward pass computes kFilter - 1 gradients twice.
inline constexpr int kConvRounds = 16, kBackwardRound = kWarp - (kFilter - 1);

constexpr int64_t ceil_div(int64_t value, int64_t divisor) { return (value + divisor - 1) / divisor; }

ConvTiles forward_tiles(const CausalConv1dForward& p);
ConvTiles backward_tiles(const CausalConv1dBackward& p);
// Of the kernels with a thread for each row and channel: these blocks for a row.
constexpr int64_t row_blocks(int64_t dim) { return ceil_div(dim, kConvThreads); }

int causal_conv1d_fwd(const CausalConv1dForward& p, void* stream);
int causal_conv1d_bwd(const CausalConv1dBackward& p, void* stream);
// Takes filters of any width.
int causal_conv1d_update(const CausalConv1dUpdate& p, void* stream);

}  // namespace ssmtune::cuda
