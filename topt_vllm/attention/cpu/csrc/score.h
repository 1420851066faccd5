// q·k of several query vectors against one block of K, stored [D, P]: each K value is read once per register tile.
#pragma once

#include "vector.h"

namespace topt {

// Query vectors of one work item: the heads of a GQA group times the rows that share the context.
struct Queries {
  const float* wide;          // [M, D]
  const c10::BFloat16* pairs;  // [M, D], or null when the query is not bfloat16
  int count, dim;
};

// Walks the next block's K so that it is on its way while this one is scored.
struct Prefetcher {
  const char* cursor = nullptr;
  const char* end = nullptr;

  void step(int lines) {
    for (int i = 0; i < lines && cursor < end; ++i, cursor += 64) __builtin_prefetch(cursor, 0, 2);
  }
  void finish() {
    for (; cursor < end; cursor += 64) __builtin_prefetch(cursor, 0, 2);
  }
};

// scores[m, 0 .. 16 C) for MT vectors.
template <int MT, int C, typename T>
inline void score_tile(const float* query, int dim, const T* key, int64_t dim_stride, float* scores,
                       int64_t score_stride, Prefetcher& prefetch, int lines) {
  Vec16 acc[MT][C];
  for (int m = 0; m < MT; ++m) {
    for (int c = 0; c < C; ++c) acc[m][c] = Vec16(0.0f);
  }
  for (int d = 0; d < dim; ++d) {
    Vec16 column[C];
    for (int c = 0; c < C; ++c) column[c] = load16(key + d * dim_stride + c * kLanes);
    for (int m = 0; m < MT; ++m) {
      const Vec16 q(query[m * dim + d]);
      for (int c = 0; c < C; ++c) acc[m][c] = fma16(q, column[c], acc[m][c]);
    }
    if (d & 1) prefetch.step(lines);
  }
  for (int m = 0; m < MT; ++m) {
    for (int c = 0; c < C; ++c) store16(scores + m * score_stride + c * kLanes, acc[m][c]);
  }
}

#if TOPT_AVX512 && defined(__AVX512BF16__)
#define TOPT_BF16_DOT 1

// The same for 32 C tokens with vdpbf16ps: exact products of bfloat16 pairs (d, d + 1), summed in float32. Twice the
// multiplications of an FMA, and no widening of K.
template <int MT, int C>
inline void score_tile_pairs(const c10::BFloat16* query, int dim, const c10::BFloat16* key, int64_t dim_stride,
                             float* scores, int64_t score_stride, Prefetcher& prefetch, int lines) {
  __m512 low[MT][C], high[MT][C];
  for (int m = 0; m < MT; ++m) {
    for (int c = 0; c < C; ++c) low[m][c] = high[m][c] = _mm512_setzero_ps();
  }
  for (int d = 0; d < dim; d += 2) {
    const c10::BFloat16* row = key + d * dim_stride;
    __m512i first[C], second[C];
    for (int c = 0; c < C; ++c) {
      const __m512i even = _mm512_loadu_si512(row + 32 * c);
      const __m512i odd = _mm512_loadu_si512(row + dim_stride + 32 * c);
      first[c] = _mm512_unpacklo_epi16(even, odd);
      second[c] = _mm512_unpackhi_epi16(even, odd);
    }
    for (int m = 0; m < MT; ++m) {
      int pair;
      __builtin_memcpy(&pair, query + m * dim + d, sizeof(pair));
      const __m512bh q = (__m512bh)_mm512_set1_epi32(pair);
      for (int c = 0; c < C; ++c) {
        low[m][c] = _mm512_dpbf16_ps(low[m][c], (__m512bh)first[c], q);
        high[m][c] = _mm512_dpbf16_ps(high[m][c], (__m512bh)second[c], q);
      }
    }
    prefetch.step(lines);
  }
  // Unpacking works inside 128-bit lanes: low holds tokens 0-3, 8-11, ..., high 4-7, 12-15, ...
  const __m512i lower = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
  const __m512i upper = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
  for (int m = 0; m < MT; ++m) {
    for (int c = 0; c < C; ++c) {
      float* target = scores + m * score_stride + 32 * c;
      _mm512_storeu_ps(target, _mm512_permutex2var_ps(low[m][c], lower, high[m][c]));
      _mm512_storeu_ps(target + 16, _mm512_permutex2var_ps(low[m][c], upper, high[m][c]));
    }
  }
}
#endif

// scores[m, t] = q_m · k_t for t < tokens, a multiple of 16; garbage slots give garbage scores.
template <int MT, typename T>
inline void score_vectors(const Queries& q, int first, const T* key, int64_t dim_stride, int tokens, float* scores,
                          int64_t score_stride, Prefetcher& prefetch, int lines) {
  float* out = scores + first * score_stride;
  int t = 0;
#if TOPT_BF16_DOT
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    if (q.pairs) {
      const c10::BFloat16* pairs = q.pairs + static_cast<int64_t>(first) * q.dim;
      for (; t + 64 <= tokens; t += 64) {
        score_tile_pairs<MT, 2>(pairs, q.dim, key + t, dim_stride, out + t, score_stride, prefetch, 2 * lines);
      }
      for (; t + 32 <= tokens; t += 32) {
        score_tile_pairs<MT, 1>(pairs, q.dim, key + t, dim_stride, out + t, score_stride, prefetch, lines);
      }
    }
  }
#endif
  const float* wide = q.wide + static_cast<int64_t>(first) * q.dim;
  for (; t + kTileColumns * kLanes <= tokens; t += kTileColumns * kLanes) {
    score_tile<MT, kTileColumns>(wide, q.dim, key + t, dim_stride, out + t, score_stride, prefetch,
                                 (kTileColumns + 1) / 2 * lines);
  }
  for (; t < tokens; t += kLanes) {
    score_tile<MT, 1>(wide, q.dim, key + t, dim_stride, out + t, score_stride, prefetch, lines);
  }
}

template <typename T>
inline void score_block(const Queries& q, const T* key, int64_t dim_stride, int tokens, float* scores,
                        int64_t score_stride, Prefetcher prefetch) {
  // Lines of the next block for each pair of K rows and 32 tokens: the whole block within the first register tile.
  const int lines = static_cast<int>(sizeof(T));
  for (int m = 0; m < q.count; m += kTileRows) {
    switch (q.count - m) {
      case 1:
        score_vectors<1>(q, m, key, dim_stride, tokens, scores, score_stride, prefetch, lines);
        break;
      case 2:
        score_vectors<2>(q, m, key, dim_stride, tokens, scores, score_stride, prefetch, lines);
        break;
      case 3:
        score_vectors<3>(q, m, key, dim_stride, tokens, scores, score_stride, prefetch, lines);
        break;
      default:
        score_vectors<4>(q, m, key, dim_stride, tokens, scores, score_stride, prefetch, lines);
    }
  }
  prefetch.finish();
}

}  // namespace topt
