// As nibbles_vnni.h, which has the comments, with the same sums: AVX2.
#pragma once

#include <immintrin.h>

#include <cstring>

#include "ahead.h"
#include "fine_rows.h"

namespace topt {

struct RowSums {
  __m256i part[2];
};
inline Vec16 to_float(const RowSums& sums) {
  const __m256 lower = _mm256_cvtepi32_ps(sums.part[0]), upper = _mm256_cvtepi32_ps(sums.part[1]);
#if TOPT_AVX512
  return Vec16(Vec(_mm512_insertf32x8(_mm512_castps256_ps512(lower), upper, 1)));
#else
  return {lower, upper};
#endif
}

template <int MT>
TOPT_INLINE void dot_group(const uint8_t* codes, const int8_t* query, int dim, const char* ahead, RowSums (&sums)[MT]) {
  const __m256i lower = _mm256_set1_epi8(0x0f), ones = _mm256_set1_epi16(1);
  // Eight rows at a time, of which a word each fills a line.
  for (int half = 0; half < 2; ++half) {
    __m256i sum[MT][2];
    TOPT_UNROLL
    for (int m = 0; m < MT; ++m) sum[m][0] = sum[m][1] = _mm256_setzero_si256();
    for (int d = 0; d < dim; d += kWordChannels) {
      const int at = d * kLanes / 2 + half * kLineBytes;
      if (ahead) ask(ahead + at);
      __m256i low[2], high[2];
      TOPT_UNROLL
      for (int i = 0; i < 2; ++i) {
        const __m256i rows = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + at + 32 * i));
        low[i] = _mm256_and_si256(rows, lower), high[i] = _mm256_and_si256(_mm256_srli_epi16(rows, 4), lower);
      }
      TOPT_UNROLL
      for (int m = 0; m < MT; ++m) {
        int64_t first, second;
        std::memcpy(&first, query + m * dim + d, 8);
        std::memcpy(&second, query + m * dim + d + 8, 8);
        const __m256i of_low = _mm256_set1_epi64x(first), of_high = _mm256_set1_epi64x(second);
        TOPT_UNROLL
        for (int i = 0; i < 2; ++i) {
          // Four products of 15 and 127 fit 16 bits.
          const __m256i two = _mm256_maddubs_epi16(low[i], of_low);
          const __m256i four = _mm256_add_epi16(two, _mm256_maddubs_epi16(high[i], of_high));
          sum[m][i] = _mm256_add_epi32(sum[m][i], _mm256_madd_epi16(four, ones));
        }
      }
    }
    TOPT_UNROLL
    for (int m = 0; m < MT; ++m) {
      // Of rows 0, 1, 4, 5, 2, 3, 6 and 7.
      sums[m].part[half] = _mm256_permute4x64_epi64(_mm256_hadd_epi32(sum[m][0], sum[m][1]), 0xd8);
    }
  }
}

inline RowSums plus(const RowSums& sums, const int32_t* other) {
  const auto* of = reinterpret_cast<const __m256i*>(other);
  return {_mm256_add_epi32(sums.part[0], _mm256_loadu_si256(of)),
          _mm256_add_epi32(sums.part[1], _mm256_loadu_si256(of + 1))};
}

// 8-bit codes of nibbles of both planes, as they lie.
inline __m128i lower_codes(__m128i one, __m128i two) {
  const __m128i lower = _mm_set1_epi8(0x0f);
  return _mm_or_si128(_mm_slli_epi16(_mm_and_si128(one, lower), 4), _mm_and_si128(two, lower));
}
inline __m128i upper_codes(__m128i one, __m128i two) {
  const __m128i lower = _mm_set1_epi8(0x0f);
  return _mm_or_si128(_mm_andnot_si128(lower, one), _mm_and_si128(_mm_srli_epi16(two, 4), lower));
}
inline __m128i load_word(const uint8_t* word) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(word)); }

// Sums of both planes of one row with MT vectors; those behind them are 0.
template <int MT>
TOPT_INLINE __m128i dot_row(const uint8_t* one, const uint8_t* two, const int16_t* query, int dim) {
  constexpr int next = kLanes * kWordBytes;
  __m256i sum[4];
  TOPT_UNROLL
  for (int m = 0; m < 4; ++m) sum[m] = _mm256_setzero_si256();
  int d = 0;
  for (; d + kChunkChannels <= dim; d += kChunkChannels) {
    TOPT_UNROLL
    for (int pair = 0; pair < 2; ++pair) {
      const uint8_t* words = one + d * kLanes / 2 + 2 * pair * next;
      const __m128i first = _mm_unpacklo_epi64(load_word(words), load_word(words + next));
      const __m128i second = _mm_loadu_si128(reinterpret_cast<const __m128i*>(two + d / 2 + 2 * pair * kWordBytes));
      const __m256i codes[2] = {_mm256_cvtepu8_epi16(lower_codes(first, second)),
                                _mm256_cvtepu8_epi16(upper_codes(first, second))};
      TOPT_UNROLL
      for (int m = 0; m < MT; ++m) {
        TOPT_UNROLL
        for (int i = 0; i < 2; ++i) {
          const auto* q = reinterpret_cast<const __m256i*>(query + m * dim + d + 32 * i + 16 * pair);
          sum[m] = _mm256_add_epi32(sum[m], _mm256_madd_epi16(codes[i], _mm256_loadu_si256(q)));
        }
      }
    }
  }
  for (; d < dim; d += kWordChannels) {
    const __m128i first = load_word(one + d * kLanes / 2), second = load_word(two + d / 2);
    const __m128i both = _mm_unpacklo_epi64(lower_codes(first, second), upper_codes(first, second));
    const __m256i codes = _mm256_cvtepu8_epi16(both);
    TOPT_UNROLL
    for (int m = 0; m < MT; ++m) {
      const __m256i q = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(query + m * dim + d));
      sum[m] = _mm256_add_epi32(sum[m], _mm256_madd_epi16(codes, q));
    }
  }
  const __m256i pairs = _mm256_hadd_epi32(_mm256_hadd_epi32(sum[0], sum[1]), _mm256_hadd_epi32(sum[2], sum[3]));
  return _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1));
}

template <int MT>
TOPT_INLINE RowSums dot_rows(const FineRows& rows, const int16_t* query, int dim) {
  __m128i of[kFineRows];
  for (int row = 0; row < kFineRows; ++row) of[row] = dot_row<MT>(rows.one[row], rows.two[row], query, dim);
  // Four vectors of four rows, turned round.
  const __m128i low[2] = {_mm_unpacklo_epi32(of[0], of[1]), _mm_unpacklo_epi32(of[2], of[3])};
  const __m128i high[2] = {_mm_unpackhi_epi32(of[0], of[1]), _mm_unpackhi_epi32(of[2], of[3])};
  return {_mm256_set_m128i(_mm_unpackhi_epi64(low[0], low[1]), _mm_unpacklo_epi64(low[0], low[1])),
          _mm256_set_m128i(_mm_unpackhi_epi64(high[0], high[1]), _mm_unpacklo_epi64(high[0], high[1]))};
}

}  // namespace topt
