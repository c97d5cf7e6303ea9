// The forward scan: sequential in time, one channel for each thread or a few, its states in registers.
#pragma once

#include "cuda/selective_scan_device.h"
#include "cuda/selective_scan_segments.h"

namespace ssmtune::cuda {

template <typename T, int kStates, int kLanes>
struct ForwardTile {
  static constexpr int kChannels = kScanThreads / kLanes, kPadded = kStates * kLanes;
  alignas(16) T sequences[3][kChunk][kChannels];  // u, then the output; delta; z
  alignas(16) float B[kChunk][kPadded];
  alignas(16) float C[kChunk][kPadded];
};

template <typename T, int kStates, int kLanes, bool kOffset>
__global__ void __launch_bounds__(kScanThreads, forward_blocks(kLanes))
    selective_scan_fwd_kernel(const SelectiveScanForward p, const ScanLayout layout, const SegmentStates segments,
                              const __grid_constant__ SequenceTensors<3> inputs,
                              const __grid_constant__ SequenceTensors<1> output) {
  using Tile = ForwardTile<T, kStates, kLanes>;
  Tile& tile = shared_memory<Tile>();
  const BlockWork work(p, layout);
  const int64_t row = work.row_group;
  const Piece piece(p, row, work.segment, layout.segments);
  if (piece.begin == piece.end) return;
  const int slot = threadIdx.x / kLanes;
  const OwnStates<kStates, kLanes> own{static_cast<int>(threadIdx.x) % kLanes, static_cast<int>(p.dstate)};
  const bool valid = slot < work.channels;
  const int64_t channel = work.channel + slot;
  const auto matrix = [&](const float* data, int64_t batch_stride) {
    return data && valid ? data + row * batch_stride + channel * p.dstate : nullptr;
  };
  const auto vector = [&](const float* data, int64_t batch_stride) {
    return data && valid ? data[row * batch_stride + channel] : 0.0f;
  };

  float A[kStates], h[kStates], offset[kOffset ? kStates : 1];
  own.load(matrix(p.A, 0), A);
#pragma unroll
  for (int i = 0; i < kStates; ++i) A[i] *= kLog2e;
  if (layout.segments > 1) {
    own.load(valid ? segments.state(p, layout, row, work.segment, channel) : nullptr, h);
  } else {
    own.load(matrix(p.initial_state.data, p.initial_state.batch_stride), h);
  }
  if constexpr (kOffset) own.load(matrix(p.state_offset.data, p.state_offset.batch_stride), offset);
  const float D = vector(p.D, 0), delta_bias = vector(p.delta_bias, 0);
  const float output_offset = vector(p.output_offset.data, p.output_offset.batch_stride);
  const bool has_z = p.z.data != nullptr, delta_softplus = p.delta_softplus;

  for (int64_t time = piece.begin; time < piece.end; time += kChunk) {
    const int steps = hidden(static_cast<uint32_t>(min(kChunk, piece.end - time)));
    TileCopy<T, kScanThreads, 3, Tile::kChannels, Tile::kChannels>(threadIdx.x, inputs, piece.batch, work.channel, work.channels)
        .read(tile.sequences[0][0], time, steps);
    StatesCopy<T, kScanThreads, Tile::kPadded>(threadIdx.x, p.B, p.C, work.section, piece.batch, p.dstate)
        .read(tile.B[0], tile.C[0], time, steps);
    __syncthreads();

#pragma unroll 2
    for (int t = 0; t < steps; ++t) {
      const float u = to_float(tile.sequences[0][t][slot]);
      float dt = to_float(tile.sequences[1][t][slot]) + delta_bias;
      if (delta_softplus) dt = softplus(dt);
      const float dtu = dt * u;
      float y[4] = {};
#pragma unroll
      for (int k = 0; k < own.kQuads; ++k) {
        const float4 B = quad(tile.B[t] + own.first(k)), C = quad(tile.C[t] + own.first(k));
        const float b[4] = {B.x, B.y, B.z, B.w}, c[4] = {C.x, C.y, C.z, C.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int i = 4 * k + j;
          h[i] = fmaf(exp2_fast(dt * A[i]), h[i], dtu * b[j]);
          y[j] = fmaf(kOffset ? h[i] + offset[i] : h[i], c[j], y[j]);
        }
      }
      float sum = (y[0] + y[1]) + (y[2] + y[3]);
#pragma unroll
      for (int bit = kLanes / 2; bit > 0; bit /= 2) sum += __shfl_xor_sync(kAllLanes, sum, bit);
      sum += fmaf(D, u, output_offset);
      if (has_z) {
        const float z = to_float(tile.sequences[2][t][slot]);
        sum *= z * sigmoid(z);
      }
      // the lanes of a channel have all read u: they met in the sum
      if (kLanes == 1 || own.lane == 0) tile.sequences[0][t][slot] = from_float<T>(sum);
    }
    __syncthreads();
    TileCopy<T, kScanThreads, 1, Tile::kChannels, Tile::kChannels>(threadIdx.x, output, piece.batch, work.channel, work.channels)
        .write(tile.sequences[0][0], time, steps);
    if (p.chunk_states && valid && time + steps < piece.row_end) {
      own.store(p.chunk_states + (piece.chunk(time) * p.dim + channel) * p.dstate, h);
    }
    __syncthreads();
  }
  if (valid && piece.end == piece.row_end) own.store(p.last_state + (row * p.dim + channel) * p.dstate, h);
}

template <typename T, int kStates, int kLanes>
cudaError_t run_forward_kernel(const SelectiveScanForward& p, const ScanLayout& layout, void* stream) {
  const SegmentStates segments(p, layout, p.workspace);
  if (layout.segments > 1) {
    const cudaError_t error =
        find_segment_states<T, kStates, kLanes, false>(p, SequenceTensors<3>{p.delta, p.u, {}}, p.initial_state, layout, segments, stream);
    if (error != cudaSuccess) return error;
  }
  const auto kernel = p.state_offset.data ? selective_scan_fwd_kernel<T, kStates, kLanes, true>
                                          : selective_scan_fwd_kernel<T, kStates, kLanes, false>;
  return launch(kernel, layout.blocks(), kScanThreads, sizeof(ForwardTile<T, kStates, kLanes>), stream, p, layout, segments,
                SequenceTensors<3>{p.u, p.delta, p.z}, SequenceTensors<1>{p.out});
}

}  // namespace ssmtune::cuda
