// One register of floats, as wide as the instruction set this file is compiled for.
//
// Everything here lives in a namespace named after that instruction set, and nothing from the C++ library that could be
// compiled out of line is used: an inline function shared between instruction sets could be linked from the wrong one.
#pragma once

#include <cstdint>
#include <utility>  // std::integer_sequence

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#if defined(__GNUC__) && !defined(__clang__)
// GCC 12 takes the deliberately undefined operands of its own AVX-512 intrinsics for mistakes (PR 105593).
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wuninitialized"
#endif

#ifndef SSMTUNE_CPU_CAPABILITY
#define SSMTUNE_CPU_CAPABILITY default_
#endif

#define SSMTUNE_INLINE inline __attribute__((always_inline))
#if defined(__clang__)
#define SSMTUNE_UNROLL _Pragma("clang loop unroll(full)")
#else
#define SSMTUNE_UNROLL _Pragma("GCC unroll 32")
#endif

namespace ssmtune::SSMTUNE_CPU_CAPABILITY {

#if defined(__AVX512F__)
inline constexpr int kLanes = 16;
#elif defined(__AVX2__)
inline constexpr int kLanes = 8;
#else
inline constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));
typedef int32_t IntVec __attribute__((vector_size(kLanes * sizeof(int32_t))));
typedef uint32_t BitVec __attribute__((vector_size(kLanes * sizeof(uint32_t))));
typedef uint16_t HalfVec __attribute__((vector_size(kLanes * sizeof(uint16_t))));

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

SSMTUNE_INLINE BitVec bits_of(Vec x) { return (BitVec)x; }
SSMTUNE_INLINE Vec from_bits(BitVec x) { return (Vec)x; }
SSMTUNE_INLINE Vec broadcast(float x) { return x - Vec{}; }

SSMTUNE_INLINE Vec select(IntVec mask, Vec if_true, Vec if_false) {
  return mask ? if_true : if_false;
}
SSMTUNE_INLINE BitVec select(IntVec mask, BitVec if_true, BitVec if_false) {
  return mask ? if_true : if_false;
}

// Both return a NaN x.
SSMTUNE_INLINE Vec at_least(Vec x, float bound) {
#if defined(__AVX512F__)
  return _mm512_max_ps(broadcast(bound), x);
#elif defined(__AVX2__)
  return _mm256_max_ps(broadcast(bound), x);
#elif defined(__SSE2__)
  return _mm_max_ps(broadcast(bound), x);
#elif defined(__aarch64__)
  return (Vec)vmaxq_f32((float32x4_t)x, vdupq_n_f32(bound));
#else
  return select(x < bound, broadcast(bound), x);
#endif
}
SSMTUNE_INLINE Vec at_most(Vec x, float bound) {
#if defined(__AVX512F__)
  return _mm512_min_ps(broadcast(bound), x);
#elif defined(__AVX2__)
  return _mm256_min_ps(broadcast(bound), x);
#elif defined(__SSE2__)
  return _mm_min_ps(broadcast(bound), x);
#elif defined(__aarch64__)
  return (Vec)vminq_f32((float32x4_t)x, vdupq_n_f32(bound));
#else
  return select(x > bound, broadcast(bound), x);
#endif
}
SSMTUNE_INLINE Vec abs(Vec x) { return from_bits(bits_of(x) & 0x7fffffffu); }

// ---- memory --------------------------------------------------------------------------------------------------------

// Words to numbers of twice the size and back, for numbers that fit. GCC 12 makes four instructions of a conversion of vectors
// that x86 has one or two for.
SSMTUNE_INLINE BitVec widen_bits(HalfVec x) {
#if defined(__AVX512F__)
  return (BitVec)_mm512_cvtepu16_epi32((__m256i)x);
#elif defined(__AVX2__)
  return (BitVec)_mm256_cvtepu16_epi32((__m128i)x);
#else
  return __builtin_convertvector(x, BitVec);
#endif
}
SSMTUNE_INLINE HalfVec narrow_bits(BitVec x) {
#if defined(__AVX512F__)
  return (HalfVec)_mm512_cvtepi32_epi16((__m512i)x);
#elif defined(__AVX2__)
  return (HalfVec)_mm_packus_epi32(_mm256_castsi256_si128((__m256i)x), _mm256_extracti128_si256((__m256i)x, 1));
#else
  return __builtin_convertvector(x, HalfVec);
#endif
}

SSMTUNE_INLINE Vec widen(HalfVec x, BFloat16) { return from_bits(widen_bits(x) << 16); }

SSMTUNE_INLINE HalfVec narrow(Vec x, BFloat16) {  // to nearest, ties to even
#if defined(__AVX512BF16__)
  return (HalfVec)_mm512_cvtneps_pbh(x);
#else
  const BitVec bits = bits_of(x);
  const BitVec rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  // a NaN stays as it is: rounding could turn it into a number
  return narrow_bits(select(x == x, rounded, bits) >> 16);
#endif
}

SSMTUNE_INLINE Vec widen(HalfVec x, Float16) {
#if defined(__AVX512F__)
  return _mm512_cvtph_ps((__m256i)x);
#elif defined(__AVX2__) && defined(__F16C__)
  return _mm256_cvtph_ps((__m128i)x);
#elif defined(__aarch64__)
  return (Vec)vcvt_f32_f16((float16x4_t)x);
#else
  const BitVec half = __builtin_convertvector(x, BitVec);
  const BitVec magnitude = half & 0x7fffu;
  const Vec value = from_bits(magnitude << 13) * 0x1p112f;  // moves the exponent; right for subnormals too
  const BitVec special = select(magnitude >= 0x7c00u, BitVec{} + 0x7f800000u, BitVec{});
  return from_bits(bits_of(value) | special | (half & 0x8000u) << 16);
#endif
}

SSMTUNE_INLINE HalfVec narrow(Vec x, Float16) {  // to nearest, ties to even
#if defined(__AVX512F__)
  return (HalfVec)_mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__AVX2__) && defined(__F16C__)
  return (HalfVec)_mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
#elif defined(__aarch64__)
  return (HalfVec)vcvt_f16_f32((float32x4_t)x);
#else
  const BitVec sign = bits_of(x) & 0x80000000u;
  const BitVec magnitude = bits_of(x) ^ sign;
  // Adding 0.5 aligns a subnormal result with the last bits of the sum, correctly rounded.
  const BitVec subnormal = bits_of(from_bits(magnitude) + 0.5f) - 0x3f000000u;
  const BitVec normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  const BitVec overflow = select(magnitude > 0x7f800000u, BitVec{} + 0x7e00u, BitVec{} + 0x7c00u);
  BitVec half = select(magnitude < 0x38800000u, subnormal, normal);
  half = select(magnitude >= 0x47800000u, overflow, half);
  return __builtin_convertvector(half | sign >> 16, HalfVec);
#endif
}

SSMTUNE_INLINE Vec load(const float* p) {
  Vec x;
  __builtin_memcpy(&x, p, sizeof(x));
  return x;
}
SSMTUNE_INLINE void store(float* p, Vec x) { __builtin_memcpy(p, &x, sizeof(x)); }

template <typename Half>
SSMTUNE_INLINE Vec load(const Half* p) {
  HalfVec x;
  __builtin_memcpy(&x, p, sizeof(x));
  return widen(x, Half{});
}
template <typename Half>
SSMTUNE_INLINE void store(Half* p, Vec x) {
  const HalfVec half = narrow(x, Half{});
  __builtin_memcpy(p, &half, sizeof(half));
}

// The first `count` lanes, zero in the others.
template <typename T>
SSMTUNE_INLINE Vec load_first(const T* p, int64_t count) {
  if (count == kLanes) return load(p);
  T buffer[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) buffer[i] = p[i];
  return load(buffer);
}
template <typename T>
SSMTUNE_INLINE void store_first(T* p, Vec x, int64_t count) {
  if (count == kLanes) return store(p, x);
  T buffer[kLanes];
  store(buffer, x);
  for (int64_t i = 0; i < count; ++i) p[i] = buffer[i];
}

// ---- lane movement -------------------------------------------------------------------------------------------------

template <typename Index, int... lane>
SSMTUNE_INLINE Vec shuffle(Vec a, Vec b, std::integer_sequence<int, lane...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, Index::of(lane)...);
#else
  return __builtin_shuffle(a, b, IntVec{Index::of(lane)...});
#endif
}
template <typename Index>
SSMTUNE_INLINE Vec shuffle(Vec a, Vec b) {
  return shuffle<Index>(a, b, std::make_integer_sequence<int, kLanes>{});
}

// Patterns that x86 has an instruction for; lanes of the second operand count from kLanes.
template <int kHigh>
struct InterleaveLanes {  // {a0, b0, a1, b1} of the low or high half of each four lanes
  static constexpr int of(int i) { return i / 4 * 4 + i % 4 / 2 + 2 * kHigh + i % 2 * kLanes; }
};
template <int kHigh>
struct InterleavePairs {  // {a0, a1, b0, b1}
  static constexpr int of(int i) { return i / 4 * 4 + i % 2 + 2 * kHigh + i % 4 / 2 * kLanes; }
};
template <int kOdd>
struct ConcatenateQuads {  // every other four lanes of a, then of b
  static constexpr int of(int i) {
    return ((2 * (i / 4) % (kLanes / 4) + kOdd) * 4 + i % 4 + i / (kLanes / 2) * kLanes) % (2 * kLanes);
  }
};

// The steps of a sum over lanes, each for two vectors at once. After add_pairs and add_quads of four vectors, every four
// lanes hold a partial sum of each; add_halves adds every other four lanes to the next.
SSMTUNE_INLINE Vec add_pairs(Vec a, Vec b) {
  return shuffle<InterleaveLanes<0>>(a, b) + shuffle<InterleaveLanes<1>>(a, b);
}
SSMTUNE_INLINE Vec add_quads(Vec a, Vec b) {
  return shuffle<InterleavePairs<0>>(a, b) + shuffle<InterleavePairs<1>>(a, b);
}
SSMTUNE_INLINE Vec add_halves(Vec a, Vec b) {
  return shuffle<ConcatenateQuads<0>>(a, b) + shuffle<ConcatenateQuads<1>>(a, b);
}

// Lane i of the result is the sum of the lanes of x[i].
SSMTUNE_INLINE Vec sum_each(const Vec (&x)[kLanes]) {
  Vec sums[kLanes / 4];
  SSMTUNE_UNROLL
  for (int i = 0; i < kLanes / 4; ++i) {
    sums[i] = add_quads(add_pairs(x[4 * i], x[4 * i + 1]), add_pairs(x[4 * i + 2], x[4 * i + 3]));
  }
  SSMTUNE_UNROLL
  for (int count = kLanes / 8; count >= 1; count /= 2) {
    SSMTUNE_UNROLL
    for (int i = 0; i < count; ++i) sums[i] = add_halves(sums[2 * i], sums[2 * i + 1]);
  }
  return sums[0];
}

// Lane j of x[i] goes to lane i of x[j].
template <int lanes>
SSMTUNE_INLINE void transpose(Vec (&x)[lanes]) {
  Vec y[lanes];
  SSMTUNE_UNROLL
  for (int i = 0; i < lanes; i += 4) {  // 4 x 4 within each four lanes
    const Vec low01 = shuffle<InterleaveLanes<0>>(x[i], x[i + 1]), high01 = shuffle<InterleaveLanes<1>>(x[i], x[i + 1]);
    const Vec low23 = shuffle<InterleaveLanes<0>>(x[i + 2], x[i + 3]);
    const Vec high23 = shuffle<InterleaveLanes<1>>(x[i + 2], x[i + 3]);
    y[i] = shuffle<InterleavePairs<0>>(low01, low23);
    y[i + 1] = shuffle<InterleavePairs<1>>(low01, low23);
    y[i + 2] = shuffle<InterleavePairs<0>>(high01, high23);
    y[i + 3] = shuffle<InterleavePairs<1>>(high01, high23);
  }
  if constexpr (lanes == 4) {
    SSMTUNE_UNROLL
    for (int i = 0; i < 4; ++i) x[i] = y[i];
  } else if constexpr (lanes == 8) {
    SSMTUNE_UNROLL
    for (int i = 0; i < 4; ++i) {
      x[i] = shuffle<ConcatenateQuads<0>>(y[i], y[i + 4]);
      x[i + 4] = shuffle<ConcatenateQuads<1>>(y[i], y[i + 4]);
    }
  } else {
    SSMTUNE_UNROLL
    for (int i = 0; i < 4; ++i) {
      const Vec even01 = shuffle<ConcatenateQuads<0>>(y[i], y[i + 4]), odd01 = shuffle<ConcatenateQuads<1>>(y[i], y[i + 4]);
      const Vec even23 = shuffle<ConcatenateQuads<0>>(y[i + 8], y[i + 12]);
      const Vec odd23 = shuffle<ConcatenateQuads<1>>(y[i + 8], y[i + 12]);
      x[i] = shuffle<ConcatenateQuads<0>>(even01, even23);
      x[i + 4] = shuffle<ConcatenateQuads<0>>(odd01, odd23);
      x[i + 8] = shuffle<ConcatenateQuads<1>>(even01, even23);
      x[i + 12] = shuffle<ConcatenateQuads<1>>(odd01, odd23);
    }
  }
}

// ---- functions -----------------------------------------------------------------------------------------------------

inline constexpr float kLog2e = 1.4426950408889634f;
inline constexpr float kLn2 = 0.6931471805599453f;

// exp2 below splits x = n + i / entries + r and looks 2^(i / entries) up. A table entry has i taken off its exponent bits, so
// that adding the shifted integer n * entries + i multiplies by 2^n.
#if defined(__AVX512F__)
inline constexpr int kTableBits = 4;
alignas(64) inline constexpr uint32_t kExp2Table[] = {
    0x3f800000u, 0x3f7daac3u, 0x3f7b95c2u, 0x3f79c3d3u, 0x3f7837f0u, 0x3f76f532u, 0x3f75fed7u, 0x3f75583fu,
    0x3f7504f3u, 0x3f7508a4u, 0x3f75672au, 0x3f76248cu, 0x3f7744fdu, 0x3f78ccdfu, 0x3f7ac0c7u, 0x3f7d257du};
inline constexpr float kExp2Square = 0.240234286f, kExp2Cube = 0.0555023439f;
SSMTUNE_INLINE BitVec look_up_exp2(BitVec index) {
  return (BitVec)_mm512_permutexvar_epi32((__m512i)index, _mm512_load_si512(kExp2Table));
}
#elif defined(__AVX2__)
inline constexpr int kTableBits = 3;
alignas(32) inline constexpr uint32_t kExp2Table[] = {0x3f800000u, 0x3f7b95c2u, 0x3f7837f0u, 0x3f75fed7u,
                                                      0x3f7504f3u, 0x3f75672au, 0x3f7744fdu, 0x3f7ac0c7u};
inline constexpr float kExp2Square = 0.240257487f, kExp2Cube = 0.0555042662f;
SSMTUNE_INLINE BitVec look_up_exp2(BitVec index) {
  return (BitVec)_mm256_permutevar8x32_epi32(_mm256_load_si256((const __m256i*)kExp2Table), (__m256i)index);
}
#else
inline constexpr int kTableBits = 0;
#endif

// 2^x for x <= 127, within 1.2e-7 relative error; saturates below -126. Near zero it is 1 + ln2 x + ..., with exactly that 1
// and ln2: slow decays, applied thousands of times, must carry no bias.
SSMTUNE_INLINE Vec exp2(Vec x) {
  // Adding 1.5 * 2^23 / entries rounds x to a multiple of 1 / entries and leaves that multiple in the low bits of the sum.
  constexpr float kRound = 0x1.8p23f / (1 << kTableBits);
  x = at_least(x, -126.0f);
  const Vec rounded = x + kRound;
  const Vec r = x - (rounded - kRound);
  const BitVec shifted = bits_of(rounded) << (23 - kTableBits);
#if defined(__AVX2__)
  const Vec scale = from_bits(look_up_exp2(bits_of(rounded)) + shifted);
  const Vec p = (r * kExp2Cube + kExp2Square) * r + kLn2;
  return scale * r * p + scale;
#else
  Vec p = broadcast(0.00015353361913530525f);
  p = p * r + 0.0013398874607197606f;
  p = p * r + 0.009618437359242407f;
  p = p * r + 0.05550332470657783f;
  p = p * r + 0.24022647913602785f;
  p = p * r + 0.6931472028552683f;
  p = p * r + 1.0f;
  return from_bits(bits_of(p) + shifted);
#endif
}

SSMTUNE_INLINE Vec exp_negative_abs(Vec x) { return exp2(abs(x) * -kLog2e); }

// sigmoid and softplus take e = exp(-|x|), which they share.
SSMTUNE_INLINE Vec sigmoid(Vec x, Vec e) { return select(x < 0.0f, e, broadcast(1.0f)) / (1.0f + e); }

// Alone it needs no case: 1 + exp(-x), cut off below x = -88, where sigmoid is zero within 1e-38 and silu within 1e-36.
SSMTUNE_INLINE Vec one_plus_exp_minus(Vec x) { return 1.0f + exp2(at_most(x * -kLog2e, 127.0f)); }
SSMTUNE_INLINE Vec sigmoid(Vec x) { return 1.0f / one_plus_exp_minus(x); }
SSMTUNE_INLINE Vec silu(Vec x) { return x / one_plus_exp_minus(x); }

// softplus(x) = max(x, 0) + log(1 + e), the logarithm as the series of 2 atanh(s) with s = e / (2 + e) <= 1/3. Above 20 this
// agrees with a softplus that turns linear there, and so does its derivative, the sigmoid.
SSMTUNE_INLINE Vec softplus(Vec x, Vec e) {
  const Vec s = e / (2.0f + e), s2 = s * s;
  Vec p = broadcast(0.1400599685831509f);
  p = p * s2 + 0.1400090198538223f;
  p = p * s2 + 0.2001076365615791f;
  p = p * s2 + 0.3333320814225363f;
  p = p * s2 + 1.0f;
  return at_least(x, 0.0f) + (s + s) * p;
}
SSMTUNE_INLINE Vec softplus(Vec x) { return softplus(x, exp_negative_abs(x)); }

// Rounds subnormal results to zero while it lives: a state that has decayed away must not slow the scan down.
class [[maybe_unused]] FlushSubnormals {
 public:
#if defined(__aarch64__)
  FlushSubnormals() {
    __asm__ volatile("mrs %0, fpcr" : "=r"(saved_));
    __asm__ volatile("msr fpcr, %0" : : "r"(saved_ | uint64_t{1} << 24));
  }
  ~FlushSubnormals() { __asm__ volatile("msr fpcr, %0" : : "r"(saved_)); }

 private:
  uint64_t saved_;
#elif defined(__x86_64__)
  FlushSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | _MM_FLUSH_ZERO_ON); }
  ~FlushSubnormals() { _mm_setcsr(saved_); }

 private:
  unsigned int saved_;
#endif
};

}  // namespace ssmtune::SSMTUNE_CPU_CAPABILITY
