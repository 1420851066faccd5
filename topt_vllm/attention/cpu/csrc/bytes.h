// K and V in one byte an element: fp8 as vLLM stores it. Decoded exactly, in registers, just before they are multiplied:
// rows that are skipped cost neither a load nor the decoding.
#pragma once

#include <array>
#include <bit>
#include <limits>

#include "vector.h"

namespace topt {

constexpr float power_of_two(int exponent) { return std::bit_cast<float>(static_cast<uint32_t>(exponent + 127) << 23); }

// s eeee mmm with bias 7: no infinities, and one NaN of each sign.
struct E4M3 {
  uint8_t code;

  static constexpr float magnitude(int payload) {
    const int exponent = payload >> 3, fraction = payload & 7;
    if (payload == 0x7f) return std::numeric_limits<float>::quiet_NaN();
    return exponent ? (8 + fraction) * power_of_two(exponent - 10) : fraction * power_of_two(-9);
  }
  operator float() const;
};

// s eeeee mm with bias 15: the upper byte of a float16.
struct E5M2 {
  uint8_t code;

  static constexpr float magnitude(int payload) {
    const int exponent = payload >> 2, fraction = payload & 3;
    if (exponent == 31) return fraction ? std::numeric_limits<float>::quiet_NaN() : kInfinity;
    return exponent ? (4 + fraction) * power_of_two(exponent - 17) : fraction * power_of_two(-16);
  }
  operator float() const;
};

template <typename T>
constexpr bool kIsByte = std::is_same_v<T, E4M3> || std::is_same_v<T, E5M2>;

// The value of every code.
template <typename T>
constexpr std::array<float, 256> values_of() {
  std::array<float, 256> values{};
  for (int code = 0; code < 256; ++code) {
    const float magnitude = T::magnitude(code & 127);
    values[code] = code >= 128 ? -magnitude : magnitude;
  }
  return values;
}

template <typename T>
alignas(64) inline constexpr std::array<float, 256> kValues = values_of<T>();

inline E4M3::operator float() const { return kValues<E4M3>[code]; }
inline E5M2::operator float() const { return kValues<E5M2>[code]; }

// Sixteen elements in the order of their addresses.
#if TOPT_AVX512 || TOPT_AVX2

// float16 of as many codes: e5m2 lacks a zero byte. e4m3 has its exponent in place, too small by 8, after a shift;
// its NaN would be 480 / 256 and becomes one of float16.
inline __m256i half16(const E5M2* source) {
  return _mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source))), 8);
}

inline __m256i half16(const E4M3* source) {
  const __m256i words = _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
  const __m256i shifted = _mm256_and_si256(_mm256_slli_epi16(words, 7), _mm256_set1_epi16(static_cast<short>(0xbf80)));
  const __m256i payload = _mm256_and_si256(words, _mm256_set1_epi16(0x7f));
  const __m256i nan = _mm256_cmpeq_epi16(payload, _mm256_set1_epi16(0x7f));
  return _mm256_or_si256(shifted, _mm256_and_si256(nan, _mm256_set1_epi16(0x7e00)));
}

template <typename T>
  requires kIsByte<T>
inline Vec16 load16(const T* source) {
  const Vec16 bias(std::is_same_v<T, E4M3> ? 256.0f : 1.0f);
  const __m256i halves = half16(source);
#if TOPT_AVX512
  return Vec16(Vec(_mm512_cvtph_ps(halves))) * bias;
#else
  const Vec16 wide(_mm256_cvtph_ps(_mm256_castsi256_si128(halves)), _mm256_cvtph_ps(_mm256_extracti128_si256(halves, 1)));
  return wide * bias;
#endif
}

#else

template <typename T>
  requires kIsByte<T>
inline Vec16 load16(const T* source) {
  alignas(64) float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = source[i];
  return load16(lanes);
}

#endif

// C columns of 16 elements. `load` may permute their lanes between the columns; `reorder` turns either order into the
// other.
template <typename T, int C>
struct Columns {
  static void load(const T* source, Vec16 (&out)[C]) {
    TOPT_UNROLL
    for (int c = 0; c < C; ++c) out[c] = load16(source + c * kLanes);
  }
  static void reorder(Vec16 (&)[C]) {}
};

#if TOPT_AVX2
// Unpacking works inside 128-bit lanes: the first part of a column holds elements 0-3 and 8-11, the second the others.
template <int C>
struct Columns<c10::BFloat16, C> {
  static void load(const c10::BFloat16* source, Vec16 (&out)[C]) {
    const __m256i zero = _mm256_setzero_si256();
    TOPT_UNROLL
    for (int c = 0; c < C; ++c) {
      const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + c * kLanes));
      out[c] = {_mm256_castsi256_ps(_mm256_unpacklo_epi16(zero, raw)),
                _mm256_castsi256_ps(_mm256_unpackhi_epi16(zero, raw))};
    }
  }
  static void reorder(Vec16 (&columns)[C]) {
    TOPT_UNROLL
    for (Vec16& v : columns) v = {_mm256_permute2f128_ps(v[0], v[1], 0x20), _mm256_permute2f128_ps(v[0], v[1], 0x31)};
  }
};
#endif

#if TOPT_AVX512 && defined(__AVX512VBMI__)
#define TOPT_BYTE_TABLES 1

// Every magnitude of these formats is a bfloat16; its upper and its lower byte, by payload, lie in two registers each.
template <typename T>
class ByteTables {
 public:
  ByteTables() {
    for (int half = 0; half < 2; ++half) {
      upper[half] = _mm512_load_si512(kUpper.data() + 64 * half);
      lower[half] = _mm512_load_si512(kLower.data() + 64 * half);
    }
  }

  // 64 codes as bfloat16: of each 128-bit lane the first eight, and the others.
  void decode(__m512i codes, __m512i& first, __m512i& second) const {
    const __m512i sign = _mm512_set1_epi8(static_cast<char>(0x80));
    __m512i high = _mm512_permutex2var_epi8(upper[0], codes, upper[1]);
    const __m512i low = _mm512_permutex2var_epi8(lower[0], codes, lower[1]);
    high = _mm512_ternarylogic_epi32(high, codes, sign, 0xf8);  // high | (codes & sign)
    first = _mm512_unpacklo_epi8(low, high);
    second = _mm512_unpackhi_epi8(low, high);
  }

 private:
  static constexpr std::array<uint8_t, 128> bytes(int shift) {
    std::array<uint8_t, 128> out{};
    for (int payload = 0; payload < 128; ++payload) {
      out[payload] = static_cast<uint8_t>(std::bit_cast<uint32_t>(T::magnitude(payload)) >> shift);
    }
    return out;
  }
  alignas(64) static constexpr std::array<uint8_t, 128> kUpper = bytes(24), kLower = bytes(16);
  __m512i upper[2], lower[2];
};

// Lane i of vector c and lane c of vector i change places.
inline void swap_lanes(__m512 (&v)[4]) {
  const __m512 even01 = _mm512_shuffle_f32x4(v[0], v[1], 0x88), odd01 = _mm512_shuffle_f32x4(v[0], v[1], 0xdd);
  const __m512 even23 = _mm512_shuffle_f32x4(v[2], v[3], 0x88), odd23 = _mm512_shuffle_f32x4(v[2], v[3], 0xdd);
  v[0] = _mm512_shuffle_f32x4(even01, even23, 0x88);
  v[1] = _mm512_shuffle_f32x4(odd01, odd23, 0x88);
  v[2] = _mm512_shuffle_f32x4(even01, even23, 0xdd);
  v[3] = _mm512_shuffle_f32x4(odd01, odd23, 0xdd);
}

// Lane i of column c holds elements 16 i + 4 c to 16 i + 4 c + 3, as unpacking leaves them.
template <typename T>
  requires kIsByte<T>
struct Columns<T, 4> {
  ByteTables<T> tables;

  void load(const T* source, Vec16 (&out)[4]) const {
    __m512i first, second;
    tables.decode(_mm512_loadu_si512(source), first, second);
    const __m512i zero = _mm512_setzero_si512();
    const __m512i wide[4] = {_mm512_unpacklo_epi16(zero, first), _mm512_unpackhi_epi16(zero, first),
                             _mm512_unpacklo_epi16(zero, second), _mm512_unpackhi_epi16(zero, second)};
    TOPT_UNROLL
    for (int c = 0; c < 4; ++c) out[c] = Vec16(Vec(_mm512_castsi512_ps(wide[c])));
  }
  static void reorder(Vec16 (&columns)[4]) {
    __m512 v[4] = {columns[0][0], columns[1][0], columns[2][0], columns[3][0]};
    swap_lanes(v);
    TOPT_UNROLL
    for (int c = 0; c < 4; ++c) columns[c] = Vec16(Vec(v[c]));
  }
};
#else
#define TOPT_BYTE_TABLES 0
#endif

}  // namespace topt
