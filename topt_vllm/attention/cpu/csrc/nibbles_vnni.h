// Integer products of packed codes with query vectors: AVX-512 with VNNI.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "ahead.h"
#include "fine_rows.h"

namespace topt {

using RowSums = __m512i;
inline Vec16 to_float(const RowSums& sums) { return Vec16(Vec(_mm512_cvtepi32_ps(sums))); }

// Sums of plane one of 16 rows with MT vectors: sums[m][row] = sum over channels of (floor code + 8) query.
//   codes   plane one of a group
//   query   int8 [MT, D]
//   ahead   as much memory to ask for meanwhile, or null
// Rows of two registers share a vector's words, so a row ends as two neighbouring lanes.
template <int MT>
TOPT_INLINE void dot_group(const uint8_t* codes, const int8_t* query, int dim, const char* ahead, RowSums (&sums)[MT]) {
  const __m512i lower = _mm512_set1_epi8(0x0f);
  __m512i sum[MT][2];
  TOPT_UNROLL
  for (int m = 0; m < MT; ++m) sum[m][0] = sum[m][1] = _mm512_setzero_si512();
  for (int d = 0; d < dim; d += kWordChannels) {
    const uint8_t* word = codes + d * kLanes / 2;
    __m512i low[2], high[2];
    TOPT_UNROLL
    for (int i = 0; i < 2; ++i) {
      const __m512i rows = _mm512_loadu_si512(word + 64 * i);
      low[i] = _mm512_and_si512(rows, lower), high[i] = _mm512_and_si512(_mm512_srli_epi16(rows, 4), lower);
    }
    if (ahead) ask(ahead + d * kLanes / 2), ask(ahead + d * kLanes / 2 + 64);
    TOPT_UNROLL
    for (int m = 0; m < MT; ++m) {
      int64_t first, second;
      std::memcpy(&first, query + m * dim + d, 8);
      std::memcpy(&second, query + m * dim + d + 8, 8);
      const __m512i of_low = _mm512_set1_epi64(first), of_high = _mm512_set1_epi64(second);
      TOPT_UNROLL
      for (int i = 0; i < 2; ++i) {
        sum[m][i] = _mm512_dpbusd_epi32(sum[m][i], low[i], of_low);
        sum[m][i] = _mm512_dpbusd_epi32(sum[m][i], high[i], of_high);
      }
    }
  }
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  TOPT_UNROLL
  for (int m = 0; m < MT; ++m) {
    sums[m] = _mm512_add_epi32(_mm512_permutex2var_epi32(sum[m][0], even, sum[m][1]),
                               _mm512_permutex2var_epi32(sum[m][0], odd, sum[m][1]));
  }
}

inline RowSums plus(const RowSums& sums, const int32_t* other) {
  return _mm512_add_epi32(sums, _mm512_loadu_si512(other));
}

inline __m128i load_word(const uint8_t* word) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(word)); }

// Bit by bit, where the second operand is set: the third, or the first; elsewhere the other of them. The instruction
// overwrites its first operand, which so is one that nobody needs any more.
constexpr int kThird = 0xb8, kFirst = 0xe2;

// Codes in 16 bits of the 64 channels whose words begin here: those of the lower nibbles, and of the upper ones.
TOPT_INLINE void fine_codes(const uint8_t* one, const uint8_t* two, __m512i (&codes)[2]) {
  constexpr int next = kLanes * kWordBytes;
  const __m256i lower = _mm256_set1_epi8(0x0f);
  const __m256i first = _mm256_set_m128i(_mm_unpacklo_epi64(load_word(one + 2 * next), load_word(one + 3 * next)),
                                         _mm_unpacklo_epi64(load_word(one), load_word(one + next)));
  const __m256i second = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(two));
  const __m256i low = _mm256_ternarylogic_epi32(_mm256_slli_epi16(first, 4), lower, second, kThird);
  const __m256i high = _mm256_ternarylogic_epi32(_mm256_srli_epi16(second, 4), lower, first, kFirst);
  codes[0] = _mm512_cvtepu8_epi16(low), codes[1] = _mm512_cvtepu8_epi16(high);
}

// The same of one word's 16 channels, in their order, below.
TOPT_INLINE __m512i fine_codes(const uint8_t* one, const uint8_t* two) {
  const __m128i lower = _mm_set1_epi8(0x0f), first = load_word(one), second = load_word(two);
  const __m128i low = _mm_ternarylogic_epi32(_mm_slli_epi16(first, 4), lower, second, kThird);
  const __m128i high = _mm_ternarylogic_epi32(_mm_srli_epi16(second, 4), lower, first, kFirst);
  return _mm512_zextsi256_si512(_mm256_cvtepu8_epi16(_mm_unpacklo_epi64(low, high)));
}

// Sums of neighbouring lanes of 128 bits: of a's, and of b's.
template <int even, int odd>
TOPT_INLINE __m512i halves(__m512i a, __m512i b) {
  return _mm512_add_epi32(_mm512_shuffle_i64x2(a, b, even), _mm512_shuffle_i64x2(a, b, odd));
}

// Sums of both planes of four rows with MT vectors, at 4 vector + row: of (8-bit code + 128) query over channels, modulo
// 2^32.
//   query  int16 [MT, D], each chunk of 64 channels with those of its words' lower nibbles first
// Sums of vectors behind MT are anything.
template <int MT>
TOPT_INLINE RowSums dot_rows(const FineRows& rows, const int16_t* query, int dim) {
  __m512i sum[MT][kFineRows];
  TOPT_UNROLL
  for (int m = 0; m < MT; ++m) {
    TOPT_UNROLL
    for (int row = 0; row < kFineRows; ++row) sum[m][row] = _mm512_setzero_si512();
  }
  int d = 0;
  for (; d + kChunkChannels <= dim; d += kChunkChannels) {
    __m512i codes[kFineRows][2];
    TOPT_UNROLL
    for (int row = 0; row < kFineRows; ++row) {
      fine_codes(rows.one[row] + d * kLanes / 2, rows.two[row] + d / 2, codes[row]);
    }
    TOPT_UNROLL
    for (int m = 0; m < MT; ++m) {
      TOPT_UNROLL
      for (int i = 0; i < 2; ++i) {
        const __m512i q = _mm512_loadu_si512(query + m * dim + d + 32 * i);
        TOPT_UNROLL
        for (int row = 0; row < kFineRows; ++row) sum[m][row] = _mm512_dpwssd_epi32(sum[m][row], codes[row][i], q);
      }
    }
  }
  for (; d < dim; d += kWordChannels) {
    TOPT_UNROLL
    for (int row = 0; row < kFineRows; ++row) {
      const __m512i codes = fine_codes(rows.one[row] + d * kLanes / 2, rows.two[row] + d / 2);
      TOPT_UNROLL
      for (int m = 0; m < MT; ++m) {
        const auto* q = reinterpret_cast<const __m256i*>(query + m * dim + d);
        sum[m][row] = _mm512_dpwssd_epi32(sum[m][row], codes, _mm512_zextsi256_si512(_mm256_loadu_si256(q)));
      }
    }
  }
  // First across the 32-bit lanes, which leaves the four rows in each 128 bits, then across those.
  __m512i of[4];
  TOPT_UNROLL
  for (int m = 0; m < 4; ++m) {
    const __m512i* s = sum[m < MT ? m : 0];
    const __m512i first = _mm512_add_epi32(_mm512_unpacklo_epi32(s[0], s[1]), _mm512_unpackhi_epi32(s[0], s[1]));
    const __m512i second = _mm512_add_epi32(_mm512_unpacklo_epi32(s[2], s[3]), _mm512_unpackhi_epi32(s[2], s[3]));
    of[m] = _mm512_add_epi32(_mm512_unpacklo_epi64(first, second), _mm512_unpackhi_epi64(first, second));
  }
  return halves<0x88, 0xdd>(halves<0x44, 0xee>(of[0], of[1]), halves<0x44, 0xee>(of[2], of[3]));
}

}  // namespace topt
