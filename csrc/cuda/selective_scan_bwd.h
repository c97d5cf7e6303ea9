// The backward scan. A block goes through the chunks of its rows from the last to the first: from the state before a chunk it
// finds those before each tile of a few steps, then goes back over the tiles: forward once more, with the decays of all steps in
// registers and the states in shared memory, and from the last step to the first, where adjoints take the place of states.
#pragma once

#include "cuda/selective_scan_device.h"
#include "cuda/selective_scan_launch.h"
#include "cuda/selective_scan_segments.h"

namespace ssmtune::cuda {

template <typename T, int kStates, int kLanes>
struct BackwardTile {
  static constexpr int kThreads = backward_threads(kStates), kChannels = kThreads / kLanes;
  static constexpr int kPadded = kStates * kLanes, kQuads = kStates / 4;
  static constexpr int kSteps = 32 / kStates;  // of a tile: a thread holds 32 decays
  static constexpr int kTiles = kChunk / kSteps;
  // Lanes of a channel that write results of a tile, and the steps that each does.
  static constexpr int kOwners = kLanes < kSteps ? kLanes : kSteps, kOwned = kSteps / kOwners;
  // Rows are longer than what they hold: so neighbours are in other banks.
  static constexpr int kRow = kChannels + 16 / sizeof(T), kColumn = kChunk + 4;

  // the same for all threads: their registers are for other things
  BlockWork work;
  Piece piece;
  alignas(16) T sequences[4][kChunk][kRow];  // u, delta and z, then their gradients; dout
  alignas(16) float dt[kChannels][kColumn];
  alignas(16) float dtu[kChannels][kColumn];
  alignas(16) float g[kChannels][kColumn];
  alignas(16) float B[kChunk][kPadded];
  alignas(16) float C[kChunk][kPadded];
  alignas(16) float parameters[kChannels][4];  // D, delta_bias and output_offset, in a quad
  alignas(16) float channel_sums[kChannels * kOwners][4];  // for dD, ddelta_bias and doutput_offset
  alignas(16) float offset[kQuads][kThreads][4];
  // The state before each tile. Once a tile is done with, there and in the place after it: sums over some channels of what the
  // threads add to dC and to dB. While no tile is worked on, the last three places hold sums over steps: kAdjoint and so on.
  alignas(16) float state[kTiles + 1][kQuads][kThreads][4];
  static constexpr int kAdjoint = kTiles - 2, kStateOffset = kTiles - 1, kA = kTiles;
  // The states after each step of a tile, then the adjoints: what the threads add to dC and dB, but for a factor.
  alignas(16) float values[kSteps][kQuads][kThreads + 4][4];
};

// Adds x[t] up over the lanes of a channel, in pairs as soon as both are there: the steps come in their order or, kReverse, the
// last one first, each a constant to the compiler. When all have come, owner p has in x[k] the sum of step p * kOwned + k.
template <typename Tile, int kLanes, bool kReverse>
__device__ __forceinline__ void sum_over_lanes(float (&x)[Tile::kSteps], int t, int lane) {
#pragma unroll
  for (int bit = 1; bit < kLanes; bit *= 2) {
    const int apart = Tile::kOwned * bit;
    if (apart >= Tile::kSteps) {
      x[0] += __shfl_xor_sync(kAllLanes, x[0], bit);
      continue;
    }
    if (t / apart % 2 != (kReverse ? 0 : 1)) return;
    t = kReverse ? t : t - apart;
    const float low = x[t], high = x[t + apart], kept = lane & bit ? high : low;
    // the other of the two
    const float given = __uint_as_float(__float_as_uint(low) ^ __float_as_uint(high) ^ __float_as_uint(kept));
    x[t] = kept + __shfl_xor_sync(kAllLanes, given, bit);
  }
}

template <int kLanes>
__device__ __forceinline__ float sum_over_lanes(float x) {
#pragma unroll
  for (int bit = kLanes / 2; bit > 0; bit /= 2) x += __shfl_xor_sync(kAllLanes, x, bit);
  return x;
}

// Waits until all threads that read or write values of the same channels have come: those of a warp, or all.
template <typename Tile, int kLanes>
__device__ __forceinline__ void meet_over_channels() {
  if constexpr (Tile::kSteps * kLanes <= 32) {
    __syncwarp();
  } else {
    __syncthreads();
  }
}

// Adds up over some channels factor[channel][step] * values, for each step of a tile; to the values are added offsets, kOffset.
template <typename Tile, int kLanes, bool kOffset>
__device__ __forceinline__ void sum_over_channels(Tile& tile, float (*sums)[Tile::kThreads][4],
                                                  const float (*factor)[Tile::kColumn], int first) {
  constexpr int kColumns = Tile::kSteps * kLanes;
  const int thread = threadIdx.x, split = thread / kColumns, t = thread % kColumns / kLanes, lane = thread % kLanes;
#pragma unroll
  for (int k = 0; k < Tile::kQuads; ++k) {
    float4 sum = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
#pragma unroll
    for (int c = 0; c < Tile::kSteps; ++c) {
      const int source = split * kColumns + c * kLanes + lane;
      float4 x = quad(tile.values[t][k][source]);
      if constexpr (kOffset) {
        const float4 offset = quad(tile.offset[k][source]);
        x.x += offset.x, x.y += offset.y, x.z += offset.z, x.w += offset.w;
      }
      const float f = factor[split * Tile::kSteps + c][first + t];
      sum.x = fmaf(f, x.x, sum.x), sum.y = fmaf(f, x.y, sum.y), sum.z = fmaf(f, x.z, sum.z), sum.w = fmaf(f, x.w, sum.w);
    }
    set_quad(sums[k][thread], sum);
  }
}

// Where a block leaves its share. One of a gradient that rows share is that of a group of rows and one of so many segments; one
// of a gradient with a row for each is that of a segment.
__device__ __forceinline__ float* share(const GradientShares& shares, const BlockWork& work, int64_t segments, int64_t row) {
  const int64_t segment = segments > 1 ? work.segment : 0;
  const int64_t number = shares.count == 1 ? 0 : shares.row_stride ? segment : work.row_group * segments + segment;
  return shares.data + number * shares.size + row * shares.row_stride;
}

// Blocks that the shared memory of an SM has room for.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 900
template <typename T>
constexpr int backward_blocks(int) {
  return 1;
}
#else
template <typename T>
constexpr int backward_blocks(int states) {
  return states == 4 && sizeof(T) == 2 ? 2 : 1;
}
#endif

template <typename T, int kStates, int kLanes, bool kOffset>
__global__ void __launch_bounds__(backward_threads(kStates), backward_blocks<T>(kStates))
    selective_scan_bwd_kernel(const SelectiveScanBackward p, const ScanLayout layout, const SegmentStates segments,
                              const BackwardWorkspace w, const __grid_constant__ SequenceTensors<4> inputs,
                              const __grid_constant__ SequenceTensors<3> outputs) {
  using Tile = BackwardTile<T, kStates, kLanes>;
  constexpr int kThreads = Tile::kThreads, kSteps = Tile::kSteps, kQuads = Tile::kQuads, kRow = Tile::kRow;
  // Steps whose decays are computed again: as many as leave the registers for the rest.
  constexpr int kComputedTwice = kStates > 4 ? 0 : kLanes > 4 ? 4 : kOffset;
  Tile& tile = shared_memory<Tile>();
  if (threadIdx.x == 0) tile.work = BlockWork(p, layout);
  __syncthreads();
  const BlockWork& work = tile.work;
  const int thread = threadIdx.x, slot = threadIdx.x / kLanes;
  const OwnStates<kStates, kLanes> own{static_cast<int>(threadIdx.x % kLanes), static_cast<int>(p.dstate)};
  const auto valid = [&] { return slot < work.channels; };
  const auto channel = [&] { return work.channel + slot; };
  const auto matrix = [&](const float* data, int64_t row_offset) {
    return data && valid() ? data + row_offset + channel() * p.dstate : nullptr;
  };

  float A[kStates];
  own.load(matrix(p.A, 0), A);
#pragma unroll
  for (int i = 0; i < kStates; ++i) A[i] *= kLog2e;
  const bool has_z = p.z.data, wants_dBC = w.dBC, delta_softplus = p.delta_softplus;
  if (own.lane == 0) {
    tile.parameters[slot][0] = p.D && valid() ? p.D[channel()] : 0.0f;
    tile.parameters[slot][1] = p.delta_bias && valid() ? p.delta_bias[channel()] : 0.0f;
  }
  const float zeros[kStates] = {};
  store_quads<kQuads>(tile.state[Tile::kA], thread, zeros);
  store_quads<kQuads>(tile.state[Tile::kStateOffset], thread, zeros);
  const bool owner = kLanes == Tile::kOwners || own.lane < Tile::kOwners;
  const auto owned = [](int thread) {
    return kLanes == Tile::kOwners ? thread : thread / kLanes * Tile::kOwners + thread % kLanes;
  };
  if (owner) set_quad(tile.channel_sums[owned(thread)], make_float4(0.0f, 0.0f, 0.0f, 0.0f));

  const auto write_matrix = [&](const GradientShares& shares, int64_t segments, int64_t row, int place) {
    float x[kStates];
    load_quads<kQuads>(tile.state[place], thread, x);
    if (shares.target && valid()) own.store(share(shares, work, segments, row) + channel() * p.dstate, x);
    store_quads<kQuads>(tile.state[place], thread, zeros);
  };
  const auto write_vector = [&](const GradientShares& shares, int64_t row, int number) {
    float* const sums = tile.channel_sums[owned(hidden(thread))];
    const float sum = sum_over_lanes<kLanes>(owner ? sums[number] : 0.0f);
    if (shares.target && valid() && own.lane == 0) share(shares, work, layout.segments, row)[channel()] = sum;
    if (owner) sums[number] = 0.0f;
  };
  const Piece& piece = tile.piece;
  for (int64_t next = work.row_group; next < p.rows; next = piece.row + layout.row_groups) {
    __syncthreads();
    if (thread == 0) tile.piece = Piece(p, next, work.segment, layout.segments);
    __syncthreads();
    float adjoint[kStates];
    if (layout.segments > 1) {
      own.load(valid() ? segments.state(p, layout, piece.row, work.segment, channel()) : nullptr, adjoint);
    } else {
      own.load(matrix(p.dlast_state, piece.row * p.dim * p.dstate), adjoint);
    }
    store_quads<kQuads>(tile.state[Tile::kAdjoint], thread, adjoint);
    if constexpr (kOffset) {
      float offset[kStates];
      own.load(matrix(p.state_offset.data, piece.row * p.state_offset.batch_stride), offset);
      store_quads<kQuads>(tile.offset, thread, offset);
    }
    if (own.lane == 0) {
      tile.parameters[slot][2] =
          p.output_offset.data && valid() ? p.output_offset.data[piece.row * p.output_offset.batch_stride + channel()] : 0.0f;
    }

    for (uint32_t chunk = piece.chunks(); chunk-- > 0;) {
      const auto time = [&] { return piece.begin + hidden(chunk) * kChunk; };
      const int steps = hidden(static_cast<uint32_t>(min(kChunk, piece.end - time())));
      // what is not read is zero, and stays finite
      if (steps < kChunk || work.channels < Tile::kChannels || !p.dout.data) {
        for (int i = hidden(threadIdx.x); i < static_cast<int>(sizeof(tile.sequences) / 16); i += kThreads) {
          set_quad(reinterpret_cast<float*>(tile.sequences) + 4 * i, make_float4(0.0f, 0.0f, 0.0f, 0.0f));
        }
        __syncthreads();
      }
      TileCopy<T, kThreads, 4, Tile::kChannels, kRow>(hidden(threadIdx.x), inputs, piece.batch, work.channel, work.channels)
          .read(tile.sequences[0][0], time(), steps);
      StatesCopy<T, kThreads, Tile::kPadded>(hidden(threadIdx.x), p.B, p.C, work.section, piece.batch, p.dstate)
          .read(tile.B[0], tile.C[0], time(), steps);
      float h[kStates];
      if (time() == piece.row_begin) {
        own.load(matrix(p.initial_state.data, piece.row * p.initial_state.batch_stride), h);
      } else {
        own.load(matrix(p.chunk_states, (piece.chunk(time()) - 1) * p.dim * p.dstate), h);
      }
      __syncthreads();

      // What depends on the step and the channel alone; zero past the last step, which makes such steps change nothing.
      const unsigned reader = hidden(threadIdx.x), c = reader % Tile::kChannels;
#pragma unroll 1
      for (int first = reader / Tile::kChannels * 4; first < kChunk; first += kThreads / Tile::kChannels * 4) {
        float dt[4], dtu[4], g[4];
#pragma unroll
        for (int k = 0; k < 4; ++k) dt[k] = to_float(tile.sequences[1][first + k][c]) + tile.parameters[c][1];
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
          dt[k] = first + k < steps ? dt[k] : 0.0f;
          dtu[k] = dt[k] * to_float(tile.sequences[0][first + k][c]);
        }
        set_quad(&tile.dt[c][first], make_float4(dt[0], dt[1], dt[2], dt[3]));
        set_quad(&tile.dtu[c][first], make_float4(dtu[0], dtu[1], dtu[2], dtu[3]));
        set_quad(&tile.g[c][first], make_float4(g[0], g[1], g[2], g[3]));
      }
      __syncthreads();

      float carry[kStates], dA[kStates], dstate_offset[kStates] = {};
      load_quads<kQuads>(tile.state[Tile::kAdjoint], thread, carry);
      load_quads<kQuads>(tile.state[Tile::kA], thread, dA);
      if constexpr (kOffset) load_quads<kQuads>(tile.state[Tile::kStateOffset], thread, dstate_offset);
      const int tiles = (steps + kSteps - 1) / kSteps;
      for (int s = 0;; ++s) {
        store_quads<kQuads>(tile.state[s], thread, h);
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
        float before[kStates], h[kStates], offset[kStates] = {}, a[kSteps][kStates], y[kSteps] = {};
        load_quads<kQuads>(tile.state[s], thread, before);
        if constexpr (kOffset) load_quads<kQuads>(tile.offset, thread, offset);
#pragma unroll
        for (int i = 0; i < kStates; ++i) h[i] = before[i];
#pragma unroll
        for (int t4 = 0; t4 < kSteps; t4 += 4) {
          const int first = s * kSteps + t4;
          const float4 dt4 = quad(&tile.dt[slot][first]), dtu4 = quad(&tile.dtu[slot][first]);
          const float dt[4] = {dt4.x, dt4.y, dt4.z, dt4.w}, dtu[4] = {dtu4.x, dtu4.y, dtu4.z, dtu4.w};
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
                h[i] = fmaf(a[t][i], h[i], dtu[q] * b[j]);
                y[t] = fmaf(kOffset ? h[i] + offset[i] : h[i], c[j], y[t]);
              }
            }
            store_quads<kQuads>(tile.values[t], thread, h);
            sum_over_lanes<Tile, kLanes, false>(y, t, own.lane);
          }
        }
        if (wants_dBC) {
          // the sums of the tile before have been read, too
          __syncthreads();
          sum_over_channels<Tile, kLanes, kOffset>(tile, tile.state[s], tile.g, s * kSteps);
          meet_over_channels<Tile, kLanes>();
        }

        // the adjoint, G, last step first; it takes the place of the state
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
            float adjoint[kStates];
            if (t > 0) load_quads<kQuads>(tile.values[t - 1], thread, h);
#pragma unroll
            for (int k = 0; k < kQuads; ++k) {
              const float4 B = quad(tile.B[first + q] + own.first(k)), C = quad(tile.C[first + q] + own.first(k));
              const float b[4] = {B.x, B.y, B.z, B.w}, c[4] = {C.x, C.y, C.z, C.w};
#pragma unroll
              for (int j = 0; j < 4; ++j) {
                const int i = 4 * k + j;
                adjoint[i] = fmaf(g[q], c[j], carry[i]);
                sum_input[t] = fmaf(adjoint[i], b[j], sum_input[t]);
                carry[i] = adjoint[i] * (t < kComputedTwice ? exp2_fast(dt[q] * A[i]) : a[t][i]);
                const float decayed = carry[i] * (t > 0 ? h[i] : before[i]);
                sum_decay[t] = fmaf(decayed, A[i], sum_decay[t]);
                dA[i] = fmaf(decayed, dt[q], dA[i]);
                if constexpr (kOffset) dstate_offset[i] = fmaf(g[q], c[j], dstate_offset[i]);
              }
            }
            store_quads<kQuads>(tile.values[t], thread, adjoint);
            sum_over_lanes<Tile, kLanes, true>(sum_input, t, own.lane);
            sum_over_lanes<Tile, kLanes, true>(sum_decay, t, own.lane);
          }
        }
        // here, and not after the loop, where the compiler would put the sums off, and keep all that goes into them
        if (s == 0) {
          store_quads<kQuads>(tile.state[Tile::kAdjoint], thread, carry);
          store_quads<kQuads>(tile.state[Tile::kA], thread, dA);
          if constexpr (kOffset) store_quads<kQuads>(tile.state[Tile::kStateOffset], thread, dstate_offset);
        }
        if (wants_dBC) {
          meet_over_channels<Tile, kLanes>();
          sum_over_channels<Tile, kLanes, false>(tile, tile.state[s + 1], tile.dtu, s * kSteps);
        }

        if (owner) {
          const float4 parameters = quad(tile.parameters[slot]);
          const float D = parameters.x;
          float4 channel_sums = quad(tile.channel_sums[owned(thread)]);
#pragma unroll
          for (int k = 0; k < Tile::kOwned; ++k) {
            const int t = s * kSteps + own.lane * Tile::kOwned + k;
            const float u = to_float(tile.sequences[0][t][slot]), dt = tile.dt[slot][t], g = tile.g[slot][t];
            float ddelta = t < steps ? fmaf(u, sum_input[k], sum_decay[k] * kLn2) : 0.0f;
            if (delta_softplus) ddelta *= sigmoid(to_float(tile.sequences[1][t][slot]) + parameters.y);
            tile.sequences[0][t][slot] = from_float<T>(fmaf(dt, sum_input[k], D * g));
            tile.sequences[1][t][slot] = from_float<T>(ddelta);
            if (has_z) {
              const float z = to_float(tile.sequences[2][t][slot]), gate = sigmoid(z);
              const float slope_of_gate = to_float(tile.sequences[3][t][slot]) * gate * fmaf(z, 1.0f - gate, 1.0f);
              tile.sequences[2][t][slot] = from_float<T>(slope_of_gate * (y[k] + fmaf(D, u, parameters.z)));
            }
            channel_sums.x = fmaf(g, u, channel_sums.x);
            channel_sums.y += ddelta;
            channel_sums.z += g;
          }
          set_quad(tile.channel_sums[owned(thread)], channel_sums);
        }

        if (wants_dBC) {
          __syncthreads();
          constexpr int kColumns = kSteps * kLanes;
          for (int i = hidden(threadIdx.x); i < 2 * kQuads * kColumns; i += kThreads) {
            const int which = i / (kQuads * kColumns), k = i / kColumns % kQuads, column = i % kColumns;
            const auto* const sums = tile.state[s + 1 - which][k];
            float4 sum = quad(sums[column]);
            for (int split = 1; split < kThreads / kColumns; ++split) {
              const float4 x = quad(sums[split * kColumns + column]);
              sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
            }
            const int t = s * kSteps + column / kLanes;
            if (t >= steps) continue;
            const int64_t step = (piece.batch * layout.channel_blocks + work.channel_block) * p.seqlen + time() + t;
            set_quad(w.dBC + (step * 2 + which) * Tile::kPadded + 4 * (k * kLanes + column % kLanes), sum);
          }
        }
      }
      __syncthreads();
      TileCopy<T, kThreads, 3, Tile::kChannels, kRow>(hidden(threadIdx.x), outputs, piece.batch, work.channel, work.channels)
          .write(tile.sequences[0][0], time(), steps);
      __syncthreads();
    }

    if (work.segment == 0) {
      if (w.dinitial_state.target && !w.dinitial_state.row_stride && piece.row != work.row_group) {
        float sum[kStates];
        own.load(matrix(share(w.dinitial_state, work, 1, piece.row), 0), sum);
        load_quads<kQuads>(tile.state[Tile::kAdjoint], thread, adjoint);
#pragma unroll
        for (int i = 0; i < kStates; ++i) adjoint[i] += sum[i];
        store_quads<kQuads>(tile.state[Tile::kAdjoint], thread, adjoint);
      }
      write_matrix(w.dinitial_state, 1, piece.row, Tile::kAdjoint);
    }
    if (kOffset && w.dstate_offset.row_stride) write_matrix(w.dstate_offset, layout.segments, piece.row, Tile::kStateOffset);
    if (w.doutput_offset.row_stride) write_vector(w.doutput_offset, piece.row, 2);
  }

  write_matrix(w.dA, layout.segments, 0, Tile::kA);
  write_vector(w.dD, 0, 0);
  write_vector(w.ddelta_bias, 0, 1);
  if (kOffset && !w.dstate_offset.row_stride) write_matrix(w.dstate_offset, layout.segments, 0, Tile::kStateOffset);
  if (!w.doutput_offset.row_stride) write_vector(w.doutput_offset, 0, 2);
}

template <typename T, int kStates, int kLanes>
int run_backward_kernel(const SelectiveScanBackward& p, const ScanLayout& layout, const SegmentStates& segments,
                                const BackwardWorkspace& w, void* stream) {
  static_assert(sizeof(BackwardTile<T, kStates, kLanes>) <= kMostSharedBytes);
  const auto kernel = p.state_offset.data ? selective_scan_bwd_kernel<T, kStates, kLanes, true>
                                          : selective_scan_bwd_kernel<T, kStates, kLanes, false>;
  int error = launch(kernel, layout.blocks(), backward_threads(kStates), sizeof(BackwardTile<T, kStates, kLanes>), stream, p,
                             layout, segments, w, SequenceTensors<4>{p.u, p.delta, p.z, p.dout},
                             SequenceTensors<3>{p.du, p.ddelta, p.dz});
  for (const GradientShares* shares :
       {&w.dA, &w.dD, &w.ddelta_bias, &w.dinitial_state, &w.dstate_offset, &w.doutput_offset}) {
    if (error == cudaSuccess) error = sum_shares(*shares, stream);
  }
  return error == cudaSuccess && w.dBC ? sum_state_gradients(p, layout, w.dBC, stream) : error;
}

}  // namespace ssmtune::cuda
