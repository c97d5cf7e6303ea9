// Cutting a row in segments that run at the same time: what each adds to a state that starts from zero, then, in order, the state
// that each really starts from. Forward the state is h, from the first step on; backward its adjoint, from the last step back.
#pragma once

#include "cuda/selective_scan_device.h"

namespace ssmtune::cuda {

// Where they are kept: (rows, segments, dim, dstate), and (rows, segments, dim) sums of dt.
struct SegmentStates {
  float *states, *steps;

  SegmentStates(const SelectiveScanParams& p, const ScanLayout& layout, float* workspace)
      : states(workspace), steps(workspace ? workspace + p.rows * layout.segments * p.dim * p.dstate : nullptr) {}

  __device__ float* state(const SelectiveScanParams& p, const ScanLayout& layout, int64_t row, int64_t segment,
                          int64_t channel) const {
    return states + ((row * layout.segments + segment) * p.dim + channel) * p.dstate;
  }
};

template <typename T, int kStates, int kLanes>
struct SegmentTile {
  static constexpr int kChannels = kScanThreads / kLanes, kPadded = kStates * kLanes;
  alignas(16) T sequences[3][kChunk][kChannels];  // delta; u or dout; z
  alignas(16) float B[kChunk][kPadded];
  alignas(16) float C[kChunk][kPadded];
};

// h = a h + dt u B, or, with kReverse, h = a (h + C g).
template <typename T, int kStates, int kLanes, bool kReverse>
__global__ void __launch_bounds__(kScanThreads, forward_blocks(kLanes))
    segment_kernel(const SelectiveScanParams p, const ScanLayout layout, const SegmentStates segments,
                   const __grid_constant__ SequenceTensors<3> inputs) {
  using Tile = SegmentTile<T, kStates, kLanes>;
  Tile& tile = shared_memory<Tile>();
  const BlockWork work(p, layout);
  const int64_t row = work.row_group;
  const Piece piece(p, row, work.segment, layout.segments);
  const int slot = threadIdx.x / kLanes;
  const OwnStates<kStates, kLanes> own{static_cast<int>(threadIdx.x) % kLanes, static_cast<int>(p.dstate)};
  const bool valid = slot < work.channels, has_input = inputs.x[1].data, has_z = inputs.x[2].data;
  const int64_t channel = work.channel + slot;

  float A[kStates], h[kStates] = {};
  // compensated: times A it is a large exponent, in which what rounding lost would show
  float all_steps = 0.0f, lost = 0.0f;
  own.load(valid ? p.A + channel * p.dstate : nullptr, A);
#pragma unroll
  for (int i = 0; i < kStates; ++i) A[i] *= kLog2e;
  const float delta_bias = p.delta_bias && valid ? p.delta_bias[channel] : 0.0f;

  const int64_t chunks = (piece.end - piece.begin + kChunk - 1) / kChunk;
  for (int64_t i = 0; i < chunks; ++i) {
    const int64_t time = piece.begin + (kReverse ? chunks - 1 - i : i) * kChunk;
    const int steps = hidden(static_cast<uint32_t>(min(kChunk, piece.end - time)));
    TileCopy<T, kScanThreads, 3, Tile::kChannels, Tile::kChannels>(threadIdx.x, inputs, piece.batch, work.channel, work.channels)
        .read(tile.sequences[0][0], time, steps);
    StatesCopy<T, kScanThreads, Tile::kPadded>(threadIdx.x, p.B, p.C, work.section, piece.batch, p.dstate)
        .read(tile.B[0], tile.C[0], time, steps);
    __syncthreads();
    for (int s = 0; s < steps; ++s) {
      const int t = kReverse ? steps - 1 - s : s;
      float dt = to_float(tile.sequences[0][t][slot]) + delta_bias;
      if (p.delta_softplus) dt = softplus(dt);
      const float sum = all_steps + (dt - lost);
      lost = (sum - all_steps) - (dt - lost);
      all_steps = sum;
      float x = has_input ? to_float(tile.sequences[1][t][slot]) : 0.0f;
      if (has_z) {
        const float z = to_float(tile.sequences[2][t][slot]);
        x *= z * sigmoid(z);
      }
      if (!kReverse) x *= dt;
#pragma unroll
      for (int k = 0; k < own.kQuads; ++k) {
        const float4 values = quad((kReverse ? tile.C : tile.B)[t] + own.first(k));
        const float w[4] = {values.x, values.y, values.z, values.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
          const int i = 4 * k + j;
          const float a = exp2_fast(dt * A[i]);
          h[i] = kReverse ? a * fmaf(w[j], x, h[i]) : fmaf(a, h[i], x * w[j]);
        }
      }
    }
    __syncthreads();
  }
  if (!valid) return;
  own.store(segments.state(p, layout, row, work.segment, channel), h);
  if (own.lane == 0) segments.steps[(row * layout.segments + work.segment) * p.dim + channel] = all_steps;
}

// Replaces what each segment adds by the state before it (backward: after it); one thread for each state of a channel. `first`
// is where that of the first (backward: the last) segment is found, zero if there is none.
template <bool kReverse>
__global__ void __launch_bounds__(kScanThreads)
    join_segments_kernel(const SelectiveScanParams p, const ChannelParameter first, const ScanLayout layout,
                         const SegmentStates segments) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kScanThreads + threadIdx.x, size = p.dim * p.dstate;
  if (i >= p.rows * size) return;
  const int64_t row = i / size, of_row = i % size, channel = of_row / p.dstate;
  const float A = p.A[of_row] * kLog2e;
  float h = first.data ? first.data[row * first.batch_stride + of_row] : 0.0f;
  for (int64_t s = 0; s < layout.segments; ++s) {
    const int64_t at = row * layout.segments + (kReverse ? layout.segments - 1 - s : s);
    float* const state = segments.states + at * size + of_row;
    const float added = *state;
    *state = h;
    const float steps = segments.steps[at * p.dim + channel], exponent = A * steps, lost = fmaf(A, steps, -exponent);
    h = fmaf(exp2_fast(exponent) * fmaf(lost, kLn2, 1.0f), h, added);
  }
}

// `layout` is that of the forward scan for as many segments; `inputs` are delta and u, backward delta, dout and z.
template <typename T, int kStates, int kLanes, bool kReverse>
cudaError_t find_segment_states(const SelectiveScanParams& p, const SequenceTensors<3>& inputs, const ChannelParameter& first,
                                const ScanLayout& layout, const SegmentStates& segments, void* stream) {
  const cudaError_t error = launch(segment_kernel<T, kStates, kLanes, kReverse>, layout.blocks(), kScanThreads,
                                   sizeof(SegmentTile<T, kStates, kLanes>), stream, p, layout, segments, inputs);
  if (error != cudaSuccess) return error;
  const int64_t threads = p.rows * p.dim * p.dstate;
  return launch(join_segments_kernel<kReverse>, (threads + kScanThreads - 1) / kScanThreads, kScanThreads, 0, stream, p, first,
                layout, segments);
}

}  // namespace ssmtune::cuda
