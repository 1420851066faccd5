// q·k of several query vectors against one block of K, stored [D, P].
//
// K is read once, whole rows of it at a time, and from several pages in turns: a slice is two rows of each eighth of
// D. It stays in the first cache while every register tile of tokens and vectors takes its turn; the sums rest in
// `scores` between slices. The slice some kilobytes further on is prefetched in the same order.
#pragma once

#include <algorithm>
#include <type_traits>

#include "vector.h"

namespace topt {

// Stripes of D, and the rows of each that make a slice; chosen by measurement (README.md).
constexpr int kStripes = 8, kSliceRows = 2;
// Distance between prefetch and use: latency times bandwidth, several times over.
constexpr int kPrefetchBytes = 20480;
constexpr int kLineBytes = 64;

// Query vectors of one work item: the heads of a GQA group times the rows that share the context.
struct Queries {
  const float* wide;           // [M, D]
  const c10::BFloat16* pairs;  // [M, D], or null when the query is not bfloat16
  int count, dim;
};

// What is read some slices later: they start in block `near` and go on in `far`; null past the end.
template <typename T>
struct Ahead {
  const T* near;
  const T* far;
  int rows;  // of each stripe, to the place in `near`
};

struct Slice {
  int stripe;  // rows from one stripe to the next
  bool first, last;
};

// One register tile of one slice: scores[m, 0 .. 16 C) for MT vectors. `key` points at the first row and token,
// `ahead` at those of the slice to prefetch, or is null.
template <int MT, int C, typename T>
inline void score_tile(const Slice& slice, const float* query, int dim, const T* key, int64_t dim_stride,
                       float* scores, int64_t score_stride, const T* ahead) {
  Vec16 acc[MT][C];
  TOPT_UNROLL
  for (int m = 0; m < MT; ++m) {
    TOPT_UNROLL
    for (int c = 0; c < C; ++c) {
      acc[m][c] = slice.first ? Vec16(0.0f) : load16(scores + m * score_stride + c * kLanes);
    }
  }
  for (int at = 0; at < kSliceRows * kStripes; ++at) {
    const int d = at / (2 * kStripes) * 2 + at % 2 + at / 2 % kStripes * slice.stripe;
    if (ahead) {
      TOPT_UNROLL
      for (int c = 0; c < C; c += kLineBytes / (kLanes * static_cast<int>(sizeof(T)))) {
        __builtin_prefetch(ahead + d * dim_stride + c * kLanes, 0, 2);
      }
    }
    Vec16 column[C];
    TOPT_UNROLL
    for (int c = 0; c < C; ++c) column[c] = load16(key + d * dim_stride + c * kLanes);
    TOPT_UNROLL
    for (int m = 0; m < MT; ++m) {
      const Vec16 q(query[m * dim + d]);
      TOPT_UNROLL
      for (int c = 0; c < C; ++c) acc[m][c] = fma16(q, column[c], acc[m][c]);
    }
  }
  TOPT_UNROLL
  for (int m = 0; m < MT; ++m) {
    TOPT_UNROLL
    for (int c = 0; c < C; ++c) store16(scores + m * score_stride + c * kLanes, acc[m][c]);
  }
}

#if TOPT_AVX512 && defined(__AVX512BF16__)
#define TOPT_BF16_DOT 1
#else
#define TOPT_BF16_DOT 0
#endif

#if TOPT_BF16_DOT

// The same for 32 C tokens with vdpbf16ps: exact products of bfloat16 pairs (d, d + 1), summed in float32. Twice the
// multiplications of an FMA, and no widening of K.
template <int MT, int C>
inline void score_tile_pairs(const Slice& slice, const c10::BFloat16* query, int dim, const c10::BFloat16* key,
                             int64_t dim_stride, float* scores, int64_t score_stride,
                             const c10::BFloat16* ahead) {
  __m512 low[MT][C], high[MT][C];
  TOPT_UNROLL
  for (int m = 0; m < MT; ++m) {
    TOPT_UNROLL
    for (int c = 0; c < C; ++c) {
      const float* sum = scores + m * score_stride + 32 * c;
      low[m][c] = slice.first ? _mm512_setzero_ps() : _mm512_loadu_ps(sum);
      high[m][c] = slice.first ? _mm512_setzero_ps() : _mm512_loadu_ps(sum + 16);
    }
  }
  for (int at = 0; at < kSliceRows / 2 * kStripes; ++at) {
    const int d = at / kStripes * 2 + at % kStripes * slice.stripe;
    const c10::BFloat16* rows = key + d * dim_stride;
    if (ahead) {
      TOPT_UNROLL
      for (int c = 0; c < C; ++c) {
        __builtin_prefetch(ahead + d * dim_stride + 32 * c, 0, 2);
        __builtin_prefetch(ahead + (d + 1) * dim_stride + 32 * c, 0, 2);
      }
    }
    __m512i first[C], second[C];
    TOPT_UNROLL
    for (int c = 0; c < C; ++c) {
      const __m512i even = _mm512_loadu_si512(rows + 32 * c);
      const __m512i odd = _mm512_loadu_si512(rows + dim_stride + 32 * c);
      first[c] = _mm512_unpacklo_epi16(even, odd);
      second[c] = _mm512_unpackhi_epi16(even, odd);
    }
    TOPT_UNROLL
    for (int m = 0; m < MT; ++m) {
      int pair;
      __builtin_memcpy(&pair, query + m * dim + d, sizeof(pair));
      const __m512bh q = (__m512bh)_mm512_set1_epi32(pair);
      TOPT_UNROLL
      for (int c = 0; c < C; ++c) {
        low[m][c] = _mm512_dpbf16_ps(low[m][c], (__m512bh)first[c], q);
        high[m][c] = _mm512_dpbf16_ps(high[m][c], (__m512bh)second[c], q);
      }
    }
  }
  // Unpacking works inside 128-bit lanes: low holds tokens 0-3, 8-11, ..., high 4-7, 12-15, ...
  const __m512i lower = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i upper = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  TOPT_UNROLL
  for (int m = 0; m < MT; ++m) {
    TOPT_UNROLL
    for (int c = 0; c < C; ++c) {
      float* target = scores + m * score_stride + 32 * c;
      const __m512 a = low[m][c], b = high[m][c];
      _mm512_storeu_ps(target, slice.last ? _mm512_permutex2var_ps(a, lower, b) : a);
      _mm512_storeu_ps(target + 16, slice.last ? _mm512_permutex2var_ps(a, upper, b) : b);
    }
  }
}
#endif

// One slice for MT vectors and all tokens.
template <int MT, typename T>
inline void score_vectors(const Slice& slice, const Queries& q, int first, int row, const T* key, int64_t dim_stride,
                          int tokens, float* scores, int64_t score_stride, const T* ahead) {
  float* out = scores + first * score_stride;
  int t = 0;
#if TOPT_BF16_DOT
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    if (q.pairs) {
      const c10::BFloat16* pairs = q.pairs + static_cast<int64_t>(first) * q.dim + row;
      for (; t + 64 <= tokens; t += 64) {
        score_tile_pairs<MT, 2>(slice, pairs, q.dim, key + t, dim_stride, out + t, score_stride,
 ahead ? ahead + t : nullptr);
      }
      for (; t + 32 <= tokens; t += 32) {
        score_tile_pairs<MT, 1>(slice, pairs, q.dim, key + t, dim_stride, out + t, score_stride,
 ahead ? ahead + t : nullptr);
      }
    }
  }
#endif
  const float* wide = q.wide + static_cast<int64_t>(first) * q.dim + row;
  for (; t + kTileColumns * kLanes <= tokens; t += kTileColumns * kLanes) {
    score_tile<MT, kTileColumns>(slice, wide, q.dim, key + t, dim_stride, out + t, score_stride,
 ahead ? ahead + t : nullptr);
  }
  for (; t < tokens; t += kLanes) {
    score_tile<MT, 1>(slice, wide, q.dim, key + t, dim_stride, out + t, score_stride,
 ahead ? ahead + t : nullptr);
  }
}

// scores[m, t] = q_m · k_t for t < tokens, a multiple of 16; garbage slots give garbage scores.
template <typename T>
inline void score_block(const Queries& q, const T* key, int64_t dim_stride, int tokens, float* scores,
                        int64_t score_stride, const Ahead<T>& ahead) {
  const int stripe = q.dim / kStripes;
  for (int row = 0; row < stripe; row += kSliceRows) {
    const Slice slice{stripe, row == 0, row + kSliceRows == stripe};
    const int target = row + ahead.rows;
    const T* next = target < stripe ? ahead.near : ahead.far;
    if (next) next += (target < stripe ? target : target - stripe) * dim_stride;
    const T* rows = key + row * dim_stride;
    for (int m = 0; m < q.count; m += kTileRows) {
      switch (q.count - m) {
        case 1:
          score_vectors<1>(slice, q, m, row, rows, dim_stride, tokens, scores, score_stride, next);
          break;
        case 2:
          score_vectors<2>(slice, q, m, row, rows, dim_stride, tokens, scores, score_stride, next);
          break;
        case 3:
          score_vectors<3>(slice, q, m, row, rows, dim_stride, tokens, scores, score_stride, next);
          break;
        default:
          score_vectors<4>(slice, q, m, row, rows, dim_stride, tokens, scores, score_stride, next);
      }
      next = nullptr;
    }
  }
}

}  // namespace topt
