// What the kernels of the selective scan share: where a block of threads works, its states in registers, and tiles of
// sequences in shared memory.
#pragma once

#include "cuda/device.h"
#include "cuda/selective_scan.h"

namespace ssmtune::cuda {

// Of numbers below 2^32: a division of 64 bits is a call, for which a kernel sets registers aside.
__device__ __forceinline__ int64_t divide(int64_t x, int64_t y) { return static_cast<uint32_t>(x) / static_cast<uint32_t>(y); }
__device__ __forceinline__ int64_t remainder(int64_t x, int64_t y) { return static_cast<uint32_t>(x) % static_cast<uint32_t>(y); }

// Blocks that an SM must have registers for, in the forward scan and the first pass over segments; 0 leaves it to the compiler.
// Of many lanes it makes room for up to 8 and spills, while shared memory has room for 2 to 6.
constexpr int forward_blocks(int lanes) { return lanes < 8 ? 0 : 4; }

// The steps [begin, end) of one row: all of them, or a segment.
struct Piece {
  int64_t row, batch, row_begin, row_end, begin, end;
  int64_t first_chunk;  // where the row's chunks are kept

  __device__ Piece(const SelectiveScanParams& p, int64_t row, int64_t segment, int64_t segments) : row(row) {
    batch = p.bounds ? 0 : row;
    row_begin = 0;
    row_end = p.seqlen;
    if (p.bounds) {
      // nobody has read these values before: whatever is wrong with them, every sequence has a step, and leaves one to each of
      // the others
      const int64_t others = p.rows - 1 - row;
      row_begin = min(max(p.bounds[row], row), p.seqlen - others - 1);
      row_end = min(max(p.bounds[row + 1], row_begin + 1), p.seqlen - others);
    }
    first_chunk = p.bounds ? (row_begin - row) / kChunk : row * ((p.seqlen - 1) / kChunk);
    const int64_t chunks = (row_end - row_begin + kChunk - 1) / kChunk, each = divide(chunks + segments - 1, segments);
    begin = min(row_begin + segment * each * kChunk, row_end);
    end = min(begin + each * kChunk, row_end);
  }
  __device__ uint32_t chunks() const { return static_cast<uint32_t>((end - begin + kChunk - 1) / kChunk); }
  // Where the state after the chunk that begins at `time` is kept.
  __device__ int64_t chunk(int64_t time) const { return first_chunk + (time - row_begin) / kChunk; }
};

// The part of the work that a block of threads does.
struct BlockWork {
  int64_t channel_block, section, row_group, segment;
  int64_t channel;  // the first
  int channels;

  __device__ BlockWork(const SelectiveScanParams& p, const ScanLayout& layout) {
    const int64_t others = divide(blockIdx.x, layout.channel_blocks);
    channel_block = remainder(blockIdx.x, layout.channel_blocks);
    row_group = remainder(others, layout.row_groups);
    segment = divide(others, layout.row_groups);
    section = divide(channel_block, layout.section_blocks);
    const int64_t first = remainder(channel_block, layout.section_blocks) * layout.block_channels;
    channel = section * layout.section_channels + first;
    channels = static_cast<int>(min(layout.block_channels, layout.section_channels - first));
  }
};

// The states of one channel that a thread holds: quads of neighbours, those of `kLanes` threads interleaved, so that the
// threads read neighbouring quads of shared memory.
template <int kStates, int kLanes>
struct OwnStates {
  static constexpr int kQuads = kStates / 4;
  int lane, dstate;

  __device__ __forceinline__ int first(int quad) const { return 4 * (quad * kLanes + lane); }

  // Missing states are zero.
  __device__ __forceinline__ void load(const float* row, float (&x)[kStates]) const {
    const OwnStates here{static_cast<int>(hidden(lane)), dstate};
#pragma unroll
    for (int i = 0; i < kStates; ++i) {
      const int n = here.first(i / 4) + i % 4;
      x[i] = row && n < dstate ? row[n] : 0.0f;
    }
  }
  __device__ __forceinline__ void store(float* row, const float (&x)[kStates]) const {
    const OwnStates here{static_cast<int>(hidden(lane)), dstate};
#pragma unroll
    for (int i = 0; i < kStates; ++i) {
      const int n = here.first(i / 4) + i % 4;
      if (n < dstate) row[n] = x[i];
    }
  }
};

__device__ __forceinline__ float4 quad(const float* x) { return *reinterpret_cast<const float4*>(x); }
__device__ __forceinline__ void set_quad(float* x, float4 value) { *reinterpret_cast<float4*>(x) = value; }

// The states of a thread in shared memory, in quads that neighbours in a warp have side by side.
template <int kQuads, int kThreads>
__device__ __forceinline__ void load_quads(const float (*from)[kThreads][4], int thread, float (&x)[4 * kQuads]) {
#pragma unroll
  for (int k = 0; k < kQuads; ++k) {
    const float4 values = quad(from[k][thread]);
    x[4 * k] = values.x, x[4 * k + 1] = values.y, x[4 * k + 2] = values.z, x[4 * k + 3] = values.w;
  }
}
template <int kQuads, int kThreads>
__device__ __forceinline__ void store_quads(float (*to)[kThreads][4], int thread, const float (&x)[4 * kQuads]) {
#pragma unroll
  for (int k = 0; k < kQuads; ++k) {
    set_quad(to[k][thread], make_float4(x[4 * k], x[4 * k + 1], x[4 * k + 2], x[4 * k + 3]));
  }
}

// Those that are null are left out.
template <int kCount>
struct SequenceTensors {
  SequenceTensor x[kCount];
};

// Steps and channels of tensors that a block works on at a time, in shared memory as [tensor][step][kRow channels]. All threads
// copy at once: each some vectors of 16 bytes of one tensor, or, where those are not aligned or reach out of the tensor, elements.
template <typename T, int kThreads, int kTensors, int kChannels, int kRow>
class TileCopy {
  static constexpr int kGroup = kThreads / (kTensors > 2 ? 4 : kTensors), kSteps = kChunk, kTile = kSteps * kRow;
  static constexpr int kVector = 16 / sizeof(T), kAcross = (kChannels + kVector - 1) / kVector;
  struct alignas(16) Vector {
    T data[kVector];
  };

 public:
  __device__ TileCopy(unsigned thread, const SequenceTensors<kTensors>& tensors, int64_t batch, int64_t channel, int channels) {
    const int number = thread / kGroup;
    thread_ = thread % kGroup;
    tensor_ = number < kTensors ? tensors.x[number] : SequenceTensor{};
    base_ = static_cast<T*>(tensor_.data) + batch * tensor_.batch_stride + channel * (tensor_.channels_last ? 1 : tensor_.stride);
    tile_ = number * kTile;
    channels_ = channels;
    aligned_ = (reinterpret_cast<uintptr_t>(base_) | static_cast<uintptr_t>(tensor_.stride * sizeof(T))) % 16 == 0;
  }

  __device__ __forceinline__ void read(T* tiles, int64_t time, int steps) const {
    T* const tile = tiles + tile_;
    // Several loads before the first store, where they are many: the compiler cannot tell that stores go elsewhere, and would
    // wait for each load.
    constexpr int kRounds = (kSteps * kChannels / kVector + kGroup - 1) / kGroup, kAhead = 4;
    if (kRounds <= kAhead || !tensor_.data || !takes_vectors(time, steps)) {
      each(time, steps, [&](T* element, int t, int c, bool vector) {
        if (!vector) {
          tile[t * kRow + c] = *element;
        } else if (tensor_.channels_last) {
          *reinterpret_cast<Vector*>(tile + t * kRow + c) = *reinterpret_cast<const Vector*>(element);
        } else {
          const Vector values = *reinterpret_cast<const Vector*>(element);
#pragma unroll
          for (int k = 0; k < kVector; ++k) tile[(t + k) * kRow + c] = values.data[k];
        }
      });
      return;
    }
    T* const first = base_ + time * (tensor_.channels_last ? tensor_.stride : 1);
    for (int round = 0; round < kRounds; round += kAhead) {
      uint4 ahead[kAhead];
      int t[kAhead], c[kAhead];
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        const int i = thread_ + (round + k) * kGroup;
        t[k] = tensor_.channels_last ? i / kAcross : i / kChannels * kVector;
        c[k] = tensor_.channels_last ? i % kAcross * kVector : i % kChannels;
        if (c[k] >= channels_) t[k] = kSteps;
        const int64_t offset = tensor_.channels_last ? t[k] * tensor_.stride + c[k] : c[k] * tensor_.stride + t[k];
        if (t[k] < steps) ahead[k] = *reinterpret_cast<const uint4*>(first + offset);
      }
#pragma unroll
      for (int k = 0; k < kAhead; ++k) {
        if (t[k] >= steps) continue;
        T* const target = tile + t[k] * kRow + c[k];
        if (tensor_.channels_last) {
          *reinterpret_cast<uint4*>(target) = ahead[k];
        } else {
          Vector values;
          memcpy(&values, &ahead[k], sizeof(values));
#pragma unroll
          for (int i = 0; i < kVector; ++i) target[i * kRow] = values.data[i];
        }
      }
    }
  }

  __device__ __forceinline__ void write(const T* tiles, int64_t time, int steps) const {
    const T* const tile = tiles + tile_;
    each(time, steps, [&](T* element, int t, int c, bool vector) {
      if (!vector) {
        *element = tile[t * kRow + c];
      } else if (tensor_.channels_last) {
        *reinterpret_cast<Vector*>(element) = *reinterpret_cast<const Vector*>(tile + t * kRow + c);
      } else {
        Vector values;
#pragma unroll
        for (int k = 0; k < kVector; ++k) values.data[k] = tile[(t + k) * kRow + c];
        *reinterpret_cast<Vector*>(element) = values;
      }
    });
  }

 private:
  __device__ bool takes_vectors(int64_t time, int steps) const {
    if (tensor_.channels_last) return aligned_ && channels_ % kVector == 0;
    return aligned_ && reinterpret_cast<uintptr_t>(base_ + time) % 16 == 0 && steps % kVector == 0;
  }

  // Calls copy(element, step, channel, whether it begins a vector) for all that this thread copies.
  template <typename Copy>
  __device__ __forceinline__ void each(int64_t time, int steps, const Copy& copy) const {
    if (!tensor_.data) return;
    if (tensor_.channels_last) {
      T* const first = base_ + time * tensor_.stride;
      if (takes_vectors(time, steps)) {
        constexpr int kAtOnce = kGroup / kAcross;
        const int c = thread_ % kAcross * kVector;
        if (c >= channels_) return;
        T* element = first + thread_ / kAcross * tensor_.stride + c;
        for (int t = thread_ / kAcross; t < steps; t += kAtOnce, element += kAtOnce * tensor_.stride) copy(element, t, c, true);
        return;
      }
      for (int i = thread_; i < steps * kChannels; i += kGroup) {
        const int t = i / kChannels, c = i % kChannels;
        if (c < channels_) copy(first + t * tensor_.stride + c, t, c, false);
      }
    } else {
      T* const first = base_ + time;
      if (takes_vectors(time, steps)) {
        for (int i = thread_; i < kChannels * kSteps / kVector; i += kGroup) {
          const int c = i % kChannels, t = i / kChannels * kVector;
          if (c < channels_ && t < steps) copy(first + c * tensor_.stride + t, t, c, true);
        }
        return;
      }
      for (int i = thread_; i < kChannels * kSteps; i += kGroup) {
        const int t = i % kSteps, c = i / kSteps;
        if (c < channels_ && t < steps) copy(first + c * tensor_.stride + t, t, c, false);
      }
    }
  }

  SequenceTensor tensor_;
  T* base_;
  int thread_, tile_, channels_;
  bool aligned_;
};

// B and C of a section of channels over some steps, as floats: those of (step, state) at [step * kPadded + state], zero for missing
// states and steps. Half of the threads read each.
template <typename T, int kThreads, int kPadded>
class StatesCopy {
  static constexpr int kGroup = kThreads / 2, kSteps = kChunk, kVector = 16 / sizeof(T);
  struct alignas(16) Vector {
    T data[kVector];
  };

 public:
  __device__ StatesCopy(unsigned thread, const StateTensor& B, const StateTensor& C, int64_t section, int64_t batch,
                        int64_t dstate) {
    second_ = thread >= kGroup;
    thread_ = thread % kGroup;
    const StateTensor& x = second_ ? C : B;
    channels_last_ = x.channels_last;
    stride_ = x.stride;
    base_ = static_cast<const T*>(x.data) + section * x.group_stride + batch * x.batch_stride;
    dstate_ = static_cast<int>(dstate);
    vectors_ = channels_last_ && dstate_ == kPadded &&
               (reinterpret_cast<uintptr_t>(base_) | static_cast<uintptr_t>(stride_ * sizeof(T))) % 16 == 0;
  }

  __device__ __forceinline__ void read(float* B, float* C, int64_t time, int steps) const {
    float* const tile = second_ ? C : B;
    if (vectors_) {
      const T* const first = base_ + time * stride_;
      for (int i = thread_; i < kSteps * kPadded / kVector; i += kGroup) {
        const int t = i / (kPadded / kVector), n = i % (kPadded / kVector) * kVector;
        Vector values = {};
        if (t < steps) values = *reinterpret_cast<const Vector*>(first + t * stride_ + n);
#pragma unroll
        for (int k = 0; k < kVector; k += 4) {
          const T* const x = values.data + k;
          set_quad(tile + t * kPadded + n + k, make_float4(to_float(x[0]), to_float(x[1]), to_float(x[2]), to_float(x[3])));
        }
      }
      return;
    }
    for (int i = thread_; i < kSteps * kPadded; i += kGroup) {
      // neighbouring threads read neighbours in memory
      const int t = channels_last_ ? i / kPadded : i % kSteps, n = channels_last_ ? i % kPadded : i / kSteps;
      float value = 0.0f;
      if (t < steps && n < dstate_) value = to_float(base_[channels_last_ ? (time + t) * stride_ + n : n * stride_ + time + t]);
      tile[t * kPadded + n] = value;
    }
  }

 private:
  const T* base_;
  int64_t stride_;
  int thread_, dstate_;
  bool second_, channels_last_, vectors_;
};

}  // namespace ssmtune::cuda
