// Integer products of packed codes with query vectors, with what vector instructions there are; all give the same sums.
#pragma once

#include <cstring>

#include "ahead.h"
#include "screen_block.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace topt {

// Channels of the words that dot_row takes at once, where so many are left.
constexpr int kChunkChannels = 64;

// Sums of plane one of 16 rows with MT vectors: sums[m][row] = sum over channels of (floor code + 8) query.
//   codes   plane one of a group
//   query   int8 [MT, D]
//   ahead   as much memory to ask for meanwhile, or null
// Rows of two registers share a vector's words, so a row ends as two neighbouring lanes.
#if TOPT_AVX512 && defined(__AVX512VNNI__)

using RowSums = __m512i;
inline Vec16 to_float(const RowSums& sums) { return Vec16(Vec(_mm512_cvtepi32_ps(sums))); }

template <int MT>
TOPT_INLINE void dot_group(const uint8_t* codes, const int8_t* query, int dim, const char* ahead, RowSums (&sums)[MT]) {
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
TOPT_INLINE void dot_group(const uint8_t* codes, const int8_t* query, int dim, const char* ahead, RowSums (&sums)[MT]) {
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
TOPT_INLINE void dot_group(const uint8_t* codes, const int8_t* query, int dim, const char* ahead, RowSums (&sums)[MT]) {
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

// Where a channel's 16-bit code lies: dot_row takes whole chunks of words, first the lower nibbles of all.
inline int fine_place(int d, int dim) {
  const int chunk = d / kChunkChannels * kChunkChannels, word = d % kChunkChannels / kWordChannels;
  if (chunk + kChunkChannels > dim) return d;
  return chunk + d % kWordChannels / kWordBytes * (kChunkChannels / 2) + word * kWordBytes + d % kWordBytes;
}

// Sums of both planes of one row with MT vectors: sums[m] = sum over channels of (8-bit code + 128) query, modulo 2^32.
//   one    the row's first word of plane one; the others follow at the distance of a group's rows
//   two    its words of plane two
//   query  int16 [MT, D], each chunk of 64 channels with those of its words' lower nibbles first
// Always writes four sums; those behind MT are anything.
#if defined(__AVX2__)

using Sums4 = __m128i;

// (sum + bias + half) factor step + offset of four sums, into `out`; sum + bias modulo 2^32.
inline void finish_sums(Sums4 sums, const int32_t* bias, const float* half, const float* factor, float step,
                        const float* offset, float* out) {
  const __m128i whole = _mm_add_epi32(sums, _mm_load_si128(reinterpret_cast<const __m128i*>(bias)));
  const __m128 sum = _mm_add_ps(_mm_cvtepi32_ps(whole), _mm_load_ps(half));
  const __m128 scaled = _mm_mul_ps(_mm_mul_ps(sum, _mm_load_ps(factor)), _mm_set1_ps(step));
  _mm_storeu_ps(out, _mm_add_ps(scaled, _mm_load_ps(offset)));
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

#if TOPT_AVX512 && defined(__AVX512VNNI__)
template <int MT>
TOPT_INLINE void dot_chunk(const uint8_t* one, const uint8_t* two, const int16_t* query, int dim, __m512i (&sum)[MT]) {
  constexpr int next = kLanes * kWordBytes;
  const __m256i lower = _mm256_set1_epi8(0x0f);
  const __m256i first = _mm256_set_m128i(_mm_unpacklo_epi64(load_word(one + 2 * next), load_word(one + 3 * next)),
                                         _mm_unpacklo_epi64(load_word(one), load_word(one + next)));
  const __m256i second = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(two));
  // a where the mask is set, else b: bit by bit.
  constexpr int choose = 0xca;
  const __m256i low = _mm256_ternarylogic_epi32(lower, second, _mm256_slli_epi16(first, 4), choose);
  const __m256i high = _mm256_ternarylogic_epi32(lower, _mm256_srli_epi16(second, 4), first, choose);
  const __m512i codes[2] = {_mm512_cvtepu8_epi16(low), _mm512_cvtepu8_epi16(high)};
  TOPT_UNROLL
  for (int m = 0; m < MT; ++m) {
    TOPT_UNROLL
    for (int i = 0; i < 2; ++i) sum[m] = _mm512_dpwssd_epi32(sum[m], codes[i], _mm512_loadu_si512(query + m * dim + 32 * i));
  }
}
#else
template <int MT>
TOPT_INLINE void dot_chunk(const uint8_t* one, const uint8_t* two, const int16_t* query, int dim, __m256i (&sum)[MT]) {
  constexpr int next = kLanes * kWordBytes;
  for (int pair = 0; pair < 2; ++pair) {
    const uint8_t* words = one + 2 * pair * next;
    const __m128i first = _mm_unpacklo_epi64(load_word(words), load_word(words + next));
    const __m128i second = _mm_loadu_si128(reinterpret_cast<const __m128i*>(two + 2 * pair * kWordBytes));
    const __m256i codes[2] = {_mm256_cvtepu8_epi16(lower_codes(first, second)),
                              _mm256_cvtepu8_epi16(upper_codes(first, second))};
    for (int m = 0; m < MT; ++m) {
      for (int i = 0; i < 2; ++i) {
        const auto* q = reinterpret_cast<const __m256i*>(query + m * dim + 32 * i + 16 * pair);
        sum[m] = _mm256_add_epi32(sum[m], _mm256_madd_epi16(codes[i], _mm256_loadu_si256(q)));
      }
    }
  }
}
#endif

template <int MT>
TOPT_INLINE void dot_row(const uint8_t* one, const uint8_t* two, const int16_t* query, int dim, Sums4& sums) {
  int d = 0;
#if TOPT_AVX512 && defined(__AVX512VNNI__)
  __m512i wide[MT];
  TOPT_UNROLL
  for (int m = 0; m < MT; ++m) wide[m] = _mm512_setzero_si512();
  for (; d + kChunkChannels <= dim; d += kChunkChannels) {
    dot_chunk<MT>(one + d * kLanes / 2, two + d / 2, query + d, dim, wide);
  }
  __m256i sum[MT];
  TOPT_UNROLL
  for (int m = 0; m < MT; ++m) {
    sum[m] = _mm256_add_epi32(_mm512_castsi512_si256(wide[m]), _mm512_extracti64x4_epi64(wide[m], 1));
  }
#else
  __m256i sum[MT];
  for (int m = 0; m < MT; ++m) sum[m] = _mm256_setzero_si256();
  for (; d + kChunkChannels <= dim; d += kChunkChannels) {
    dot_chunk<MT>(one + d * kLanes / 2, two + d / 2, query + d, dim, sum);
  }
#endif
  for (; d < dim; d += kWordChannels) {
    const __m128i first = load_word(one + d * kLanes / 2), second = load_word(two + d / 2);
    const __m256i codes = _mm256_cvtepu8_epi16(_mm_unpacklo_epi64(lower_codes(first, second), upper_codes(first, second)));
    TOPT_UNROLL
    for (int m = 0; m < MT; ++m) {
      const __m256i q = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(query + m * dim + d));
      sum[m] = _mm256_add_epi32(sum[m], _mm256_madd_epi16(codes, q));
    }
  }
  const __m256i all = _mm256_hadd_epi32(_mm256_hadd_epi32(sum[0], sum[MT > 1 ? 1 : 0]),
                                        _mm256_hadd_epi32(sum[MT > 2 ? 2 : 0], sum[MT > 3 ? 3 : 0]));
  sums = _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
}

#else

struct Sums4 {
  uint32_t sum[4];
};

inline void finish_sums(const Sums4& sums, const int32_t* bias, const float* half, const float* factor, float step,
                        const float* offset, float* out) {
  for (int m = 0; m < 4; ++m) {
    const auto whole = static_cast<int32_t>(sums.sum[m] + static_cast<uint32_t>(bias[m]));
    out[m] = (static_cast<float>(whole) + half[m]) * factor[m] * step + offset[m];
  }
}

template <int MT>
TOPT_INLINE void dot_row(const uint8_t* one, const uint8_t* two, const int16_t* query, int dim, Sums4& sums) {
  uint32_t sum[4] = {};
  for (int d = 0; d < dim; d += kWordChannels) {
    const int16_t *low = query + fine_place(d, dim), *high = query + fine_place(d + kWordBytes, dim);
    for (int i = 0; i < kWordBytes; ++i) {
      const int first = one[d * kLanes / 2 + i], second = two[d / 2 + i];
      for (int m = 0; m < MT; ++m) {
        sum[m] += static_cast<uint32_t>(((first & 15) << 4 | (second & 15)) * low[m * dim + i]);
        sum[m] += static_cast<uint32_t>(((first & 0xf0) | second >> 4) * high[m * dim + i]);
      }
    }
  }
  for (int m = 0; m < 4; ++m) sums.sum[m] = sum[m];
}

#endif

}  // namespace topt
