// Integer products of packed codes with query vectors, with what vector instructions there are; all give the same sums.
#pragma once

#include <cstring>

#include "ahead.h"
#include "screen_block.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace topt {

// Channels of the words that dot_rows takes at once, where so many are left.
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

// Where a channel's 16-bit code lies: dot_rows takes whole chunks of words, first the lower nibbles of all.
inline int fine_place(int d, int dim) {
  const int chunk = d / kChunkChannels * kChunkChannels, word = d % kChunkChannels / kWordChannels;
  if (chunk + kChunkChannels > dim) return d;
  return chunk + d % kWordChannels / kWordBytes * (kChunkChannels / 2) + word * kWordBytes + d % kWordBytes;
}

// Rows that both planes are read of at a time: so many share the loads of queries and one sum across lanes.
constexpr int kFineRows = 4;

// Their first words of plane one, which the others follow at the distance of a group's rows, and of plane two.
struct FineRows {
  const uint8_t *one[kFineRows], *two[kFineRows];
};

// Sums of both planes of four rows with MT vectors, at 4 vector + row: of (8-bit code + 128) query over channels, modulo
// 2^32.
//   query  int16 [MT, D], each chunk of 64 channels with those of its words' lower nibbles first
// Sums of vectors behind MT are anything.
#if TOPT_AVX512 && defined(__AVX512VNNI__)

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

#else

inline RowSums plus(RowSums sums, const int32_t* other) {
  for (int i = 0; i < kLanes; ++i) {
    sums.row[i] = static_cast<int32_t>(static_cast<uint32_t>(sums.row[i]) + static_cast<uint32_t>(other[i]));
  }
  return sums;
}

#if defined(__AVX2__)

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

template <int MT>
TOPT_INLINE RowSums dot_rows(const FineRows& rows, const int16_t* query, int dim) {
  constexpr int next = kLanes * kWordBytes;
  RowSums sums;
  for (int row = 0; row < kFineRows; ++row) {
    const uint8_t *one = rows.one[row], *two = rows.two[row];
    __m256i sum[4];
    for (__m256i& s : sum) s = _mm256_setzero_si256();
    int d = 0;
    for (; d + kChunkChannels <= dim; d += kChunkChannels) {
      for (int pair = 0; pair < 2; ++pair) {
        const uint8_t* words = one + d * kLanes / 2 + 2 * pair * next;
        const __m128i first = _mm_unpacklo_epi64(load_word(words), load_word(words + next));
        const auto* second = reinterpret_cast<const __m128i*>(two + d / 2 + 2 * pair * kWordBytes);
        const __m256i codes[2] = {_mm256_cvtepu8_epi16(lower_codes(first, _mm_loadu_si128(second))),
                                  _mm256_cvtepu8_epi16(upper_codes(first, _mm_loadu_si128(second)))};
        for (int m = 0; m < MT; ++m) {
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
      for (int m = 0; m < MT; ++m) {
        const __m256i q = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(query + m * dim + d));
        sum[m] = _mm256_add_epi32(sum[m], _mm256_madd_epi16(codes, q));
      }
    }
    const __m256i pairs = _mm256_hadd_epi32(_mm256_hadd_epi32(sum[0], sum[1]), _mm256_hadd_epi32(sum[2], sum[3]));
    alignas(16) int32_t of[4];
    _mm_store_si128(reinterpret_cast<__m128i*>(of),
                    _mm_add_epi32(_mm256_castsi256_si128(pairs), _mm256_extracti128_si256(pairs, 1)));
    for (int m = 0; m < MT; ++m) sums.row[kFineRows * m + row] = of[m];
  }
  return sums;
}

#else

template <int MT>
TOPT_INLINE RowSums dot_rows(const FineRows& rows, const int16_t* query, int dim) {
  RowSums sums;
  for (int m = 0; m < MT; ++m) {
    for (int row = 0; row < kFineRows; ++row) {
      uint32_t sum = 0;
      for (int d = 0; d < dim; d += kWordChannels) {
        const uint8_t *one = rows.one[row] + d * kLanes / 2, *two = rows.two[row] + d / 2;
        const int16_t* low = query + m * dim + fine_place(d, dim);
        const int16_t* high = query + m * dim + fine_place(d + kWordBytes, dim);
        for (int i = 0; i < kWordBytes; ++i) {
          sum += static_cast<uint32_t>(((one[i] & 15) << 4 | (two[i] & 15)) * low[i]);
          sum += static_cast<uint32_t>(((one[i] & 0xf0) | two[i] >> 4) * high[i]);
        }
      }
      sums.row[kFineRows * m + row] = static_cast<int32_t>(sum);
    }
  }
  return sums;
}

#endif
#endif

}  // namespace topt
