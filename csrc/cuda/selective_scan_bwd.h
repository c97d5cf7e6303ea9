// The backward scan. A block goes through the chunks of its rows from the last to the first: from the state before a chunk it
// finds those before each tile of a few steps, then goes back over the tiles, with all states of one in registers.
#pragma once

#include "cuda/selective_scan_device.h"
#include "cuda/selective_scan_launch.h"
#include "cuda/selective_scan_segments.h"

namespace ssmtune::cuda {

template <typename T, int kStates, int kLanes>
struct BackwardTile {
  static constexpr int kChannels = kScanBackwardThreads / kLanes, kPadded = kStates * kLanes, kQuads = kStates / 4;
  static constexpr int kSteps = 32 / kStates;  // of a tile: a thread holds 32 states and as many decays
  static constexpr int kTiles = kChunk / kSteps;
  // Lanes of a channel that write results of a tile, and the steps that each does.
  static constexpr int kOwners = kLanes < kSteps ? kLanes : kSteps, kOwned = kSteps / kOwners;
  // Rows are longer than what they hold: so neighbours are in other banks.
  static constexpr int kRow = kChannels + 16 / sizeof(T), kColumn = kChunk + 4;

  alignas(16) T sequences[4][kChunk][kRow];  // u, delta and z, then their gradients; dout
  alignas(16) float dt[kChannels][kColumn];
  alignas(16) float dtu[kChannels][kColumn];
  alignas(16) float g[kChannels][kColumn];
  alignas(16) float B[kChunk][kPadded];
  alignas(16) float C[kChunk][kPadded];
  float D[kChannels], delta_bias[kChannels], output_offset[kChannels];
  alignas(16) float channel_sums[kChannels * kOwners][4];  // for dD, ddelta_bias and doutput_offset
  // The state before each tile. Once a tile is done with, there and in the place after it: sums over some channels of what the
  // threads add to dC and to dB.
  alignas(16) float state[kTiles + 1][kQuads][kScanBackwardThreads][4];
  // What the threads add to a quad of dB or dC, but for a factor.
  alignas(16) float values[kSteps][kScanBackwardThreads + 4][4];
};

// Adds x[t] up over the lanes of a channel, in pairs as soon as the steps from t on are there, the last step first; t is a
// constant to the compiler. Once t = 0 is done, lane p has in x[k * kLanes] the sum of step p % kSteps + k * kLanes.
template <int kLanes, int kSteps>
__device__ __forceinline__ void sum_over_lanes(float (&x)[kSteps], int t, int lane) {
#pragma unroll
  for (int bit = 1; bit < kLanes; bit *= 2) {
    if (bit >= kSteps) {
      if (t == 0) x[0] += __shfl_xor_sync(kAllLanes, x[0], bit);
    } else if (t % (2 * bit) == 0) {
      const float low = x[t], high = x[t + bit], kept = lane & bit ? high : low;
      // the other of the two
      const float given = __uint_as_float(__float_as_uint(low) ^ __float_as_uint(high) ^ __float_as_uint(kept));
      x[t] = kept + __shfl_xor_sync(kAllLanes, given, bit);
    }
  }
}

template <int kLanes>
__device__ __forceinline__ float sum_over_lanes(float x) {
#pragma unroll
  for (int bit = kLanes / 2; bit > 0; bit /= 2) x += __shfl_xor_sync(kAllLanes, x, bit);
  return x;
}

// Adds up over some channels factor[channel][step] * value(step, i), for each step of a tile and the states i of a thread.
template <bool kFirst, typename Tile, int kLanes, typename Value>
__device__ __forceinline__ void sum_over_channels(Tile& tile, float (*sums)[kScanBackwardThreads][4],
                                                  const float (*factor)[Tile::kColumn], int first, const Value& value) {
  constexpr int kSteps = Tile::kSteps, kColumns = kSteps * kLanes;
  const int thread = threadIdx.x, split = thread / kColumns, t = thread % kColumns / kLanes, lane = thread % kLanes;
  // the channels that a thread adds up are those of its warp, or not
  const auto meet = [] {
    if constexpr (kColumns <= 32) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  };
#pragma unroll
  for (int k = 0; k < Tile::kQuads; ++k) {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      set_quad(tile.values[s][thread],
               make_float4(value(s, 4 * k), value(s, 4 * k + 1), value(s, 4 * k + 2), value(s, 4 * k + 3)));
    }
    // the sums of the tile before have been read
    if constexpr (kFirst) {
      __syncthreads();
    } else {
      meet();
    }
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int c = 0; c < kSteps; ++c) {
      const float4 x = quad(tile.values[t][split * kColumns + c * kLanes + lane]);
      const float f = factor[split * kSteps + c][first + t];
      sum.x = fmaf(f, x.x, sum.x), sum.y = fmaf(f, x.y, sum.y), sum.z = fmaf(f, x.z, sum.z), sum.w = fmaf(f, x.w, sum.w);
    }
    set_quad(sums[k][thread], sum);
    meet();
  }
}

// Where a block leaves its share. One of a gradient that rows share is that of a group of rows and a segment, `part`; one of a
// gradient with a row for each is that of a segment.
__device__ __forceinline__ float* share(const GradientShares& shares, int64_t part, int64_t segment, int64_t row) {
  const int64_t number = shares.count == 1 ? 0 : shares.row_stride ? segment : part;
  return shares.data + number * shares.size + row * shares.row_stride;
}

template <typename T, int kStates, int kLanes, bool kOffset>
__global__ void __launch_bounds__(kScanBackwardThreads, kStates == 4 ? 2 : 1)
    selective_scan_bwd_kernel(const SelectiveScanBackward p, const ScanLayout layout, const SegmentStates segments,
                              const BackwardWorkspace w, const __grid_constant__ SequenceTensors<4> inputs,
                              const __grid_constant__ SequenceTensors<3> outputs) {
  using Tile = BackwardTile<T, kStates, kLanes>;
  constexpr int kThreads = kScanBackwardThreads, kSteps = Tile::kSteps, kQuads = Tile::kQuads, kRow = Tile::kRow;
  Tile& tile = shared_memory<Tile>();
  const BlockWork work(p, layout);
  const int thread = threadIdx.x, slot = thread / kLanes;
  const OwnStates<kStates, kLanes> own{thread % kLanes, static_cast<int>(p.dstate)};
  const bool valid = slot < work.channels;
  const int64_t channel = work.channel + slot, part = work.row_group * layout.segments + work.segment;
  const auto matrix = [&](const float* data, int64_t row_offset) {
    return data && valid ? data + row_offset + channel * p.dstate : nullptr;
  };

  float A[kStates];
  own.load(matrix(p.A, 0), A);
#pragma unroll
  for (int i = 0; i < kStates; ++i) A[i] *= kLog2e;
  const bool has_z = p.z.data, wants_dBC = w.dBC, delta_softplus = p.delta_softplus;
  if (own.lane == 0) {
    tile.D[slot] = p.D && valid ? p.D[channel] : 0.0f;
    tile.delta_bias[slot] = p.delta_bias && valid ? p.delta_bias[channel] : 0.0f;
  }
  float dA[kStates] = {}, dstate_offset[kOffset ? kStates : 1] = {};
  const bool owner = kLanes == Tile::kOwners || own.lane < Tile::kOwners;
  const int owned = kLanes == Tile::kOwners ? thread : slot * Tile::kOwners + own.lane;
  if (owner) set_quad(tile.channel_sums[owned], make_float4(0.0f, 0.0f, 0.0f, 0.0f));

  const auto write_matrix = [&](const GradientShares& shares, int64_t part, int64_t row, float(&x)[kStates]) {
    if (shares.target && valid) own.store(share(shares, part, work.segment, row) + channel * p.dstate, x);
#pragma unroll
    for (int i = 0; i < kStates; ++i) x[i] = 0.0f;
  };
  const auto write_vector = [&](const GradientShares& shares, int64_t row, int number) {
    const float sum = sum_over_lanes<kLanes>(owner ? tile.channel_sums[owned][number] : 0.0f);
    if (shares.target && valid && own.lane == 0) share(shares, part, work.segment, row)[channel] = sum;
    if (owner) tile.channel_sums[owned][number] = 0.0f;
  };
  if (!p.dout.data) {
    T* const dout = tile.sequences[3][0];
    for (int i = thread; i < static_cast<int>(kChunk) * kRow; i += kThreads) dout[i] = from_float<T>(0.0f);
  }

  const int64_t first_row = p.rows * work.row_group / layout.row_groups;
  const int64_t end_row = p.rows * (work.row_group + 1) / layout.row_groups;
  for (int64_t row = first_row; row < end_row; ++row) {
    const Piece piece(p, row, work.segment, layout.segments);
    float carry[kStates], offset[kOffset ? kStates : 1];
    if (layout.segments > 1) {
      own.load(valid ? segments.state(p, layout, row, work.segment, channel) : nullptr, carry);
    } else {
      own.load(matrix(p.dlast_state, row * p.dim * p.dstate), carry);
    }
    if constexpr (kOffset) own.load(matrix(p.state_offset.data, row * p.state_offset.batch_stride), offset);
    if (own.lane == 0) {
      tile.output_offset[slot] =
          p.output_offset.data && valid ? p.output_offset.data[row * p.output_offset.batch_stride + channel] : 0.0f;
    }

    const int64_t chunks = (piece.end - piece.begin + kChunk - 1) / kChunk;
    for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
      const int64_t time = piece.begin + chunk * kChunk;
      const int steps = static_cast<int>(min(kChunk, piece.end - time));
      TileCopy<T, kThreads, 4, Tile::kChannels, kRow>(inputs, piece.batch, work.channel, work.channels)
          .read(tile.sequences[0][0], time, steps);
      StatesCopy<T, kThreads, Tile::kPadded>(p.B, p.C, work.section, piece.batch, p.dstate).read(tile.B[0], tile.C[0], time, steps);
      float h[kStates];
      if (time == piece.row_begin) {
        own.load(matrix(p.initial_state.data, row * p.initial_state.batch_stride), h);
      } else {
        own.load(matrix(p.chunk_states, (piece.chunk(time) - 1) * p.dim * p.dstate), h);
      }
      __syncthreads();

      // What depends on the step and the channel alone; zero past the last of them, which makes such steps change nothing.
      for (int i = thread; i < Tile::kChannels * static_cast<int>(kChunk) / 4; i += kThreads) {
        const int c = i % Tile::kChannels, first = i / Tile::kChannels * 4;
        float dt[4], dtu[4], g[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) dt[k] = to_float(tile.sequences[1][first + k][c]) + tile.delta_bias[c];
        if (delta_softplus) {
#pragma unroll
          for (int k = 0; k < 4; ++k) dt[k] = softplus(dt[k]);
        }
#pragma unroll
        for (int k = 0; k < 4; ++k) g[k] = to_float(tile.sequences[3][first + k][c]);
        if (has_z) {
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            const float z = to_float(tile.sequences[2][first + k][c]);
            g[k] *= z * sigmoid(z);
          }
        }
#pragma unroll
        for (int k = 0; k < 4; ++k) {
          const bool inside = c < work.channels && first + k < steps;
          dt[k] = inside ? dt[k] : 0.0f;
          dtu[k] = inside ? dt[k] * to_float(tile.sequences[0][first + k][c]) : 0.0f;
          g[k] = inside ? g[k] : 0.0f;
        }
        set_quad(&tile.dt[c][first], make_float4(dt[0], dt[1], dt[2], dt[3]));
        set_quad(&tile.dtu[c][first], make_float4(dtu[0], dtu[1], dtu[2], dtu[3]));
        set_quad(&tile.g[c][first], make_float4(g[0], g[1], g[2], g[3]));
      }
      __syncthreads();

      const int tiles = (steps + kSteps - 1) / kSteps;
      for (int s = 0;; ++s) {
#pragma unroll
        for (int k = 0; k < kQuads; ++k) {
          set_quad(tile.state[s][k][thread], make_float4(h[4 * k], h[4 * k + 1], h[4 * k + 2], h[4 * k + 3]));
        }
        if (s == tiles - 1) break;
#pragma unroll
        for (int t4 = 0; t4 < kSteps; t4 += 4) {
          const int first = s * kSteps + t4;
          const float4 dt4 = quad(&tile.dt[slot][first]), dtu4 = quad(&tile.dtu[slot][first]);
          const float dt[4] = {dt4.x, dt4.y, dt4.z, dt4.w}, dtu[4] = {dtu4.x, dtu4.y, dtu4.z, dtu4.w};
#pragma unroll
          for (int t = 0; t < 4; ++t) {
#pragma unroll
            for (int k = 0; k < kQuads; ++k) {
              const float4 B = quad(tile.B[first + t] + own.first(k));
              const float b[4] = {B.x, B.y, B.z, B.w};
#pragma unroll
              for (int j = 0; j < 4; ++j) {
                const int i = 4 * k + j;
                h[i] = fmaf(exp2_fast(dt[t] * A[i]), h[i], dtu[t] * b[j]);
              }
            }
          }
        }
      }

      for (int s = tiles - 1; s >= 0; --s) {
        // the states before each step and after the last, and the decays
        float h[kSteps + 1][kStates], a[kSteps][kStates], y[kSteps] = {};
#pragma unroll
        for (int k = 0; k < kQuads; ++k) {
          const float4 x = quad(tile.state[s][k][thread]);
          h[0][4 * k] = x.x, h[0][4 * k + 1] = x.y, h[0][4 * k + 2] = x.z, h[0][4 * k + 3] = x.w;
        }
#pragma unroll
        for (int t4 = 0; t4 < kSteps; t4 += 4) {
          const int first = s * kSteps + t4;
          const float4 dt4 = quad(&tile.dt[slot][first]), dtu4 = quad(&tile.dtu[slot][first]);
          const float4 g4 = kOffset ? quad(&tile.g[slot][first]) : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
          const float dt[4] = {dt4.x, dt4.y, dt4.z, dt4.w}, dtu[4] = {dtu4.x, dtu4.y, dtu4.z, dtu4.w};
          const float g[4] = {g4.x, g4.y, g4.z, g4.w};
#pragma unroll
          for (int q = 0; q < 4; ++q) {
            const int t = t4 + q;
#pragma unroll
            for (int k = 0; k < kQuads; ++k) {
              const float4 B = quad(tile.B[first + q] + own.first(k)), C = quad(tile.C[first + q] + own.first(k));
              const float b[4] = {B.x, B.y, B.z, B.w}, c[4] = {C.x, C.y, C.z, C.w};
#pragma unroll
              for (int j = 0; j < 4; ++j) {
                const int i = 4 * k + j;
                a[t][i] = exp2_fast(dt[q] * A[i]);
                h[t + 1][i] = fmaf(a[t][i], h[t][i], dtu[q] * b[j]);
                y[t] = fmaf(kOffset ? h[t + 1][i] + offset[i] : h[t + 1][i], c[j], y[t]);
                if constexpr (kOffset) dstate_offset[i] = fmaf(g[q], c[j], dstate_offset[i]);
              }
            }
          }
        }
#pragma unroll
        for (int t = kSteps - 1; t >= 0; --t) sum_over_lanes<kLanes>(y, t, own.lane);
        if (wants_dBC) {
          sum_over_channels<true, Tile, kLanes>(tile, tile.state[s], tile.g, s * kSteps, [&](int t, int i) {
            return kOffset ? h[t + 1][i] + offset[i] : h[t + 1][i];
          });
        }

        // the adjoint, G, last step first; it takes the place of a
        float sum_input[kSteps] = {}, sum_decay[kSteps] = {};
#pragma unroll
        for (int t4 = kSteps - 4; t4 >= 0; t4 -= 4) {
          const int first = s * kSteps + t4;
          const float4 dt4 = quad(&tile.dt[slot][first]), g4 = quad(&tile.g[slot][first]);
          const float dt[4] = {dt4.x, dt4.y, dt4.z, dt4.w};
          const float g[4] = {g4.x, g4.y, g4.z, g4.w};
#pragma unroll
          for (int q = 3; q >= 0; --q) {
            const int t = t4 + q;
#pragma unroll
            for (int k = 0; k < kQuads; ++k) {
              const float4 B = quad(tile.B[first + q] + own.first(k)), C = quad(tile.C[first + q] + own.first(k));
              const float b[4] = {B.x, B.y, B.z, B.w}, c[4] = {C.x, C.y, C.z, C.w};
#pragma unroll
              for (int j = 0; j < 4; ++j) {
                const int i = 4 * k + j;
                const float adjoint = fmaf(g[q], c[j], carry[i]);
                sum_input[t] = fmaf(adjoint, b[j], sum_input[t]);
                carry[i] = adjoint * a[t][i];
                const float decayed = carry[i] * h[t][i];
                sum_decay[t] = fmaf(decayed, A[i], sum_decay[t]);
                dA[i] = fmaf(decayed, dt[q], dA[i]);
                a[t][i] = adjoint;
              }
            }
            sum_over_lanes<kLanes>(sum_input, t, own.lane);
            sum_over_lanes<kLanes>(sum_decay, t, own.lane);
          }
        }
        if (wants_dBC) {
          sum_over_channels<false, Tile, kLanes>(tile, tile.state[s + 1], tile.dtu, s * kSteps,
                                                 [&](int t, int i) { return a[t][i]; });
        }

        if (owner) {
          float4 channel_sums = quad(tile.channel_sums[owned]);
#pragma unroll
          for (int k = 0; k < Tile::kOwned; ++k) {
            const int t = s * kSteps + own.lane + k * kLanes;
            if (!valid || t >= steps) continue;
            const float D = tile.D[slot], u = to_float(tile.sequences[0][t][slot]), dt = tile.dt[slot][t], g = tile.g[slot][t];
            const float slope = delta_softplus ? sigmoid(to_float(tile.sequences[1][t][slot]) + tile.delta_bias[slot]) : 1.0f;
            const float ddelta = fmaf(u, sum_input[k * kLanes], sum_decay[k * kLanes] * kLn2) * slope;
            tile.sequences[0][t][slot] = from_float<T>(fmaf(dt, sum_input[k * kLanes], D * g));
            tile.sequences[1][t][slot] = from_float<T>(ddelta);
            if (has_z) {
              const float z = to_float(tile.sequences[2][t][slot]), gate = sigmoid(z);
              const float slope_of_gate = to_float(tile.sequences[3][t][slot]) * gate * fmaf(z, 1.0f - gate, 1.0f);
              const float output = y[k * kLanes] + fmaf(D, u, tile.output_offset[slot]);
              tile.sequences[2][t][slot] = from_float<T>(slope_of_gate * output);
            }
            channel_sums.x = fmaf(g, u, channel_sums.x);
            channel_sums.y += ddelta;
            channel_sums.z += g;
          }
          set_quad(tile.channel_sums[owned], channel_sums);
        }

        if (wants_dBC) {
          __syncthreads();
          constexpr int kColumns = kSteps * kLanes;
          for (int i = thread; i < 2 * kQuads * kColumns; i += kThreads) {
            const int which = i / (kQuads * kColumns), k = i / kColumns % kQuads, column = i % kColumns;
            const auto* const sums = tile.state[s + 1 - which][k];
            float4 sum = quad(sums[column]);
            for (int split = 1; split < kThreads / kColumns; ++split) {
              const float4 x = quad(sums[split * kColumns + column]);
              sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
            }
            const int t = s * kSteps + column / kLanes;
            if (t >= steps) continue;
            const int64_t step = (piece.batch * layout.channel_blocks + work.channel_block) * p.seqlen + time + t;
            set_quad(w.dBC + (step * 2 + which) * Tile::kPadded + 4 * (k * kLanes + column % kLanes), sum);
          }
        }
      }
      __syncthreads();
      TileCopy<T, kThreads, 3, Tile::kChannels, kRow>(outputs, piece.batch, work.channel, work.channels)
          .write(tile.sequences[0][0], time, steps);
      __syncthreads();
    }

    if (work.segment == 0) {
      if (w.dinitial_state.target && !w.dinitial_state.row_stride && row != first_row) {
        float sum[kStates];
        own.load(matrix(share(w.dinitial_state, work.row_group, 0, row), 0), sum);
#pragma unroll
        for (int i = 0; i < kStates; ++i) carry[i] += sum[i];
      }
      write_matrix(w.dinitial_state, work.row_group, row, carry);
    }
    if constexpr (kOffset) {
      if (w.dstate_offset.row_stride) write_matrix(w.dstate_offset, 0, row, dstate_offset);
    }
    if (w.doutput_offset.row_stride) write_vector(w.doutput_offset, row, 2);
  }

  write_matrix(w.dA, part, 0, dA);
  write_vector(w.dD, 0, 0);
  write_vector(w.ddelta_bias, 0, 1);
  if constexpr (kOffset) {
    if (!w.dstate_offset.row_stride) write_matrix(w.dstate_offset, part, 0, dstate_offset);
  }
  if (!w.doutput_offset.row_stride) write_vector(w.doutput_offset, 0, 2);
}

// Adds up the shares of a gradient in their order.
inline __global__ void __launch_bounds__(kScanThreads) sum_shares_kernel(const GradientShares shares) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kScanThreads + threadIdx.x;
  if (i >= shares.size) return;
  float sum = 0.0f;
  for (int64_t share = 0; share < shares.count; ++share) sum += shares.data[share * shares.size + i];
  shares.target[i] = sum;
}

// The same for dB and dC: over the blocks of channels of each section.
inline __global__ void __launch_bounds__(kScanThreads)
    sum_state_gradients_kernel(const SelectiveScanBackward p, const ScanLayout layout, const float* dBC) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kScanThreads + threadIdx.x;
  if (i >= p.batch * p.groups * p.seqlen * p.dstate) return;
  const int64_t n = i % p.dstate, t = i / p.dstate % p.seqlen, section = i / p.dstate / p.seqlen;
  const int64_t padded = layout.states * layout.lanes;
  const float* share = dBC + (section * layout.section_blocks * p.seqlen + t) * 2 * padded + n;
  float dB = 0.0f, dC = 0.0f;
  for (int64_t block = 0; block < layout.section_blocks; ++block, share += p.seqlen * 2 * padded) {
    dB += share[0];
    dC += share[padded];
  }
  if (p.dB) p.dB[i] = dB;
  if (p.dC) p.dC[i] = dC;
}

inline cudaError_t sum_shares(const GradientShares& shares, void* stream) {
  if (shares.count < 2) return cudaSuccess;
  return launch(sum_shares_kernel, (shares.size + kScanThreads - 1) / kScanThreads, kScanThreads, 0, stream, shares);
}

template <typename T, int kStates, int kLanes>
cudaError_t run_backward_kernel(const SelectiveScanBackward& p, const ScanLayout& layout, const SegmentStates& segments,
                                const BackwardWorkspace& w, void* stream) {
  const auto kernel = p.state_offset.data ? selective_scan_bwd_kernel<T, kStates, kLanes, true>
                                          : selective_scan_bwd_kernel<T, kStates, kLanes, false>;
  cudaError_t error = launch(kernel, layout.blocks(), kScanBackwardThreads, sizeof(BackwardTile<T, kStates, kLanes>), stream, p,
                             layout, segments, w, SequenceTensors<4>{p.u, p.delta, p.z, p.dout},
                             SequenceTensors<3>{p.du, p.ddelta, p.dz});
  for (const GradientShares* shares :
       {&w.dA, &w.dD, &w.ddelta_bias, &w.dinitial_state, &w.dstate_offset, &w.doutput_offset}) {
    if (error == cudaSuccess) error = sum_shares(*shares, stream);
  }
  if (error != cudaSuccess || !w.dBC) return error;
  const int64_t threads = p.batch * p.groups * p.seqlen * p.dstate;
  return launch(sum_state_gradients_kernel, (threads + kScanThreads - 1) / kScanThreads, kScanThreads, 0, stream, p, layout,
                static_cast<const float*>(w.dBC));
}

}  // namespace ssmtune::cuda
