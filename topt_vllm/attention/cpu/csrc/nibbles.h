// Integer products of packed codes with query vectors, with what vector instructions there are; all give the same sums.
#pragma once

#include <cstring>

#include "ahead.h"
#include "screen_block.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace topt {

// Sums of plane one of 16 rows with MT vectors: sums[m][row] = sum over channels of (floor code + 8) query.
//   codes   plane one of a group
//   query   int8 [MT, D]
//   ahead   as much memory to ask for meanwhile, or null
// Rows of two registers share a vector's words, so a row ends as two neighbouring lanes.
#if TOPT_AVX512 && defined(__AVX512VNNI__)

using RowSums = __m512i;
inline Vec16 to_float(const RowSums& sums) { return Vec16(Vec(_mm512_cvtepi32_ps(sums))); }

template <int MT>
inline void dot_group(const uint8_t* codes, const int8_t* query, int dim, const char* ahead, RowSums (&sums)[MT]) {
  const __m512i lower = _mm512_set1_epi8(0x0f), upper = _mm512_set1_epi8(static_cast<char>(0xf0));
  // Of the lower nibbles, and 16 times those of the upper ones.
  __m512i low[MT][2], high[MT][2];
  TOPT_UNROLL
  for (int m = 0; m < MT; ++m) low[m][0] = low[m][1] = high[m][0] = high[m][1] = _mm512_setzero_si512();
  for (int d = 0; d < dim; d += kWordChannels) {
    const uint8_t* word = codes + d * kLanes / 2;
    const __m512i rows[2] = {_mm512_loadu_si512(word), _mm512_loadu_si512(word + 64)};
    if (ahead) ask(ahead + d * kLanes / 2), ask(ahead + d * kLanes / 2 + 64);
    TOPT_UNROLL
    for (int m = 0; m < MT; ++m) {
      int64_t first, second;
      std::memcpy(&first, query + m * dim + d, 8);
      std::memcpy(&second, query + m * dim + d + 8, 8);
      const __m512i of_low = _mm512_set1_epi64(first), of_high = _mm512_set1_epi64(second);
      TOPT_UNROLL
      for (int i = 0; i < 2; ++i) {
        low[m][i] = _mm512_dpbusd_epi32(low[m][i], _mm512_and_si512(rows[i], lower), of_low);
        high[m][i] = _mm512_dpbusd_epi32(high[m][i], _mm512_and_si512(rows[i], upper), of_high);
      }
    }
  }
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  const __m512i odd = _mm512_setr_epi32(1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  TOPT_UNROLL
  for (int m = 0; m < MT; ++m) {
    const __m512i first = _mm512_add_epi32(low[m][0], _mm512_srai_epi32(high[m][0], 4));
    const __m512i second = _mm512_add_epi32(low[m][1], _mm512_srai_epi32(high[m][1], 4));
    sums[m] = _mm512_add_epi32(_mm512_permutex2var_epi32(first, even, second),
                               _mm512_permutex2var_epi32(first, odd, second));
  }
}

#else

struct RowSums {
  alignas(64) int32_t row[kLanes];
};
inline Vec16 to_float(const RowSums& sums) {
  alignas(64) float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = static_cast<float>(sums.row[i]);
  return load16(lanes);
}

#if defined(__AVX2__)

template <int MT>
inline void dot_group(const uint8_t* codes, const int8_t* query, int dim, const char* ahead, RowSums (&sums)[MT]) {
  const __m256i lower = _mm256_set1_epi8(0x0f), ones = _mm256_set1_epi16(1);
  // Four rows at a time.
  for (int row = 0; row < kLanes; row += 4) {
    __m256i sum[MT];
    TOPT_UNROLL
    for (int m = 0; m < MT; ++m) sum[m] = _mm256_setzero_si256();
    for (int d = 0; d < dim; d += kWordChannels) {
      const int at = d * kLanes / 2 + row * kWordBytes;
      const __m256i word = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + at));
      if (ahead && at % kLineBytes == 0) ask(ahead + at);
      const __m256i low = _mm256_and_si256(word, lower), high = _mm256_and_si256(_mm256_srli_epi16(word, 4), lower);
      TOPT_UNROLL
      for (int m = 0; m < MT; ++m) {
        int64_t first, second;
        std::memcpy(&first, query + m * dim + d, 8);
        std::memcpy(&second, query + m * dim + d + 8, 8);
        // Four products of 15 and 127 fit 16 bits.
        const __m256i four = _mm256_add_epi16(_mm256_maddubs_epi16(low, _mm256_set1_epi64x(first)),
                                              _mm256_maddubs_epi16(high, _mm256_set1_epi64x(second)));
        sum[m] = _mm256_add_epi32(sum[m], _mm256_madd_epi16(four, ones));
      }
    }
    TOPT_UNROLL
    for (int m = 0; m < MT; ++m) {
      alignas(32) int32_t pairs[8];
      _mm256_store_si256(reinterpret_cast<__m256i*>(pairs), sum[m]);
      for (int i = 0; i < 4; ++i) sums[m].row[row + i] = pairs[2 * i] + pairs[2 * i + 1];
    }
  }
}

#else

template <int MT>
inline void dot_group(const uint8_t* codes, const int8_t* query, int dim, const char* ahead, RowSums (&sums)[MT]) {
  for (int m = 0; m < MT; ++m) {
    for (int row = 0; row < kLanes; ++row) {
      int32_t sum = 0;
      for (int d = 0; d < dim; d += kWordChannels) {
        const uint8_t* word = codes + d * kLanes / 2 + row * kWordBytes;
        if (ahead && m == 0 && row % 8 == 0) ask(ahead + (word - codes));
        const int8_t* q = query + m * dim + d;
        for (int i = 0; i < kWordBytes; ++i) sum += (word[i] & 15) * q[i] + (word[i] >> 4) * q[i + kWordBytes];
      }
      sums[m].row[row] = sum;
    }
  }
}

#endif
#endif

// Sums of both planes of one row with MT vectors: sums[m] = sum over channels of (8-bit code + 128) query, modulo 2^32.
//   one    the row's first word of plane one; the others follow at the distance of a group's rows
//   two    its words of plane two
//   query  int16 [MT, D]
#if defined(__AVX2__)

template <int MT>
inline void dot_row(const uint8_t* one, const uint8_t* two, const int16_t* query, int dim, int32_t (&sums)[4]) {
  const __m128i lower = _mm_set1_epi8(0x0f);
  __m256i sum[4];
  TOPT_UNROLL
  for (int m = 0; m < 4; ++m) sum[m] = _mm256_setzero_si256();
  for (int d = 0; d < dim; d += kWordChannels) {
    const __m128i first = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(one + d * kLanes / 2));
    const __m128i second = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(two + d / 2));
    const __m128i low = _mm_or_si128(_mm_slli_epi16(_mm_and_si128(first, lower), 4), _mm_and_si128(second, lower));
    const __m128i high =
        _mm_or_si128(_mm_andnot_si128(lower, first), _mm_and_si128(_mm_srli_epi16(second, 4), lower));
    const __m256i codes = _mm256_cvtepu8_epi16(_mm_unpacklo_epi64(low, high));
    TOPT_UNROLL
    for (int m = 0; m < MT; ++m) {
      const __m256i q = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(query + m * dim + d));
#if defined(__AVX512VNNI__) && defined(__AVX512VL__)
      sum[m] = _mm256_dpwssd_epi32(sum[m], codes, q);
#else
      sum[m] = _mm256_add_epi32(sum[m], _mm256_madd_epi16(codes, q));
#endif
    }
  }
  const __m256i all = _mm256_hadd_epi32(_mm256_hadd_epi32(sum[0], sum[1]), _mm256_hadd_epi32(sum[2], sum[3]));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(sums),
                   _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1)));
}

#else

template <int MT>
inline void dot_row(const uint8_t* one, const uint8_t* two, const int16_t* query, int dim, int32_t (&sums)[4]) {
  for (int m = 0; m < MT; ++m) {
    uint32_t sum = 0;
    for (int d = 0; d < dim; d += kWordChannels) {
      for (int i = 0; i < kWordBytes; ++i) {
        const int first = one[d * kLanes / 2 + i], second = two[d / 2 + i];
        const int16_t* q = query + m * dim + d + i;
        sum += static_cast<uint32_t>(((first & 15) << 4 | (second & 15)) * q[0]);
        sum += static_cast<uint32_t>(((first & 0xf0) | second >> 4) * q[kWordBytes]);
      }
    }
    sums[m] = static_cast<int32_t>(sum);
  }
}

#endif

}  // namespace topt
