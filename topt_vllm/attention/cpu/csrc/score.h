// q·k of several query vectors against one block of K, stored [D, P].
//
// A register tile holds the sums of some vectors and tokens over all of D. Tiles are as wide as the block where that
// can be, so that K is read in the order of its addresses, which the hardware's own prefetching follows.
#pragma once

#include <algorithm>
#include <type_traits>

#include "ahead.h"
#include "amx.h"
#include "bytes.h"
#include "vector.h"

namespace topt {

// Query vectors of one work item: the heads of a GQA group times the rows that share the context.
struct Queries {
  const float* wide;           // [M, D]
  const c10::BFloat16* pairs;  // [M, D], or null when the query is not bfloat16
  int count, dim;
};

// Passes over a block that ask for the next one.
constexpr int kAskingPasses = 2;

// Bytes to ask for while `bytes` of K are scored in one of `passes` over the block.
inline int bytes_to_ask(int64_t bytes, int passes) {
  return static_cast<int>(bytes * kScoreShare / std::min(passes, kAskingPasses));
}

// Visits `count` vectors in passes of up to `most`, of which the first few ask: visit(integral_constant of a size,
// the first vector, the number of passes, asks).
template <int most, typename F>
inline void in_passes(int count, Asks asks, F&& visit) {
  const int passes = (count + most - 1) / most;
  int pass = 0;
  in_register_tiles<most>(count, [&](auto vectors, int m) {
    if (pass++ == kAskingPasses) asks = {};
    visit(vectors, m, passes, asks);
  });
}

// One register tile: scores[m, 0 .. 16 C) for MT vectors.
template <int MT, int C, typename T>
inline void score_tile(const float* query, int dim, const T* key, int64_t dim_stride, float* scores,
                       int64_t score_stride, Asks& asks) {
  Vec16 acc[MT][C];
  TOPT_UNROLL
  for (int m = 0; m < MT; ++m) {
    TOPT_UNROLL
    for (int c = 0; c < C; ++c) acc[m][c] = Vec16(0.0f);
  }
  const Columns<T, C> columns;
  for (int d = 0; d < dim; ++d) {
    asks.step();
    Vec16 column[C];
    columns.load(key + d * dim_stride, column);
    TOPT_UNROLL
    for (int m = 0; m < MT; ++m) {
      const Vec16 q(query[m * dim + d]);
      TOPT_UNROLL
      for (int c = 0; c < C; ++c) acc[m][c] = fma16(q, column[c], acc[m][c]);
    }
  }
  TOPT_UNROLL
  for (int m = 0; m < MT; ++m) {
    columns.reorder(acc[m]);
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

// From so many vectors on multiplications bind, not memory.
constexpr int kManyVectors = 5;

// Vectors of bfloat16 pairs (d, d + 1), one for each token, of two rows of K: 2 C of 16 tokens each.
template <typename T, int C>
struct PairColumns {
  void load(const T* even, const T* odd, __m512i (&pairs)[2 * C]) const {
    TOPT_UNROLL
    for (int c = 0; c < C; ++c) {
      const __m512i first = _mm512_loadu_si512(even + 32 * c), second = _mm512_loadu_si512(odd + 32 * c);
      pairs[2 * c] = _mm512_unpacklo_epi16(first, second), pairs[2 * c + 1] = _mm512_unpackhi_epi16(first, second);
    }
  }

  // Unpacking works inside 128-bit lanes: even vectors hold tokens 0-3, 8-11, ..., odd ones 4-7, 12-15, ...
  static void reorder(__m512 (&sums)[2 * C]) {
    const __m512i lower = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i upper = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    TOPT_UNROLL
    for (int c = 0; c < C; ++c) {
      const __m512 low = sums[2 * c], high = sums[2 * c + 1];
      sums[2 * c] = _mm512_permutex2var_ps(low, lower, high), sums[2 * c + 1] = _mm512_permutex2var_ps(low, upper, high);
    }
  }
};

#if TOPT_BYTE_TABLES
template <typename T>
  requires kIsByte<T>
struct PairColumns<T, 2> {
  ByteTables<T> tables;

  void load(const T* even, const T* odd, __m512i (&pairs)[4]) const {
    const __m512i first = _mm512_loadu_si512(even), second = _mm512_loadu_si512(odd);
    tables.decode(_mm512_unpacklo_epi8(first, second), pairs[0], pairs[1]);
    tables.decode(_mm512_unpackhi_epi8(first, second), pairs[2], pairs[3]);
  }

  static void reorder(__m512 (&sums)[4]) { swap_lanes(sums); }
};
#endif

// The same for 32 C tokens with vdpbf16ps: exact products of bfloat16 pairs, summed in float32. Twice the multiplications
// of an FMA, and no widening of K.
template <int MT, int C, typename T>
inline void score_tile_pairs(const c10::BFloat16* query, int dim, const T* key, int64_t dim_stride, float* scores,
                             int64_t score_stride, Asks& asks) {
  const PairColumns<T, C> columns;
  __m512 acc[MT][2 * C];
  TOPT_UNROLL
  for (int m = 0; m < MT; ++m) {
    TOPT_UNROLL
    for (int c = 0; c < 2 * C; ++c) acc[m][c] = _mm512_setzero_ps();
  }
  for (int d = 0; d < dim; d += 2) {
    asks.step();
    __m512i pairs[2 * C];
    columns.load(key + d * dim_stride, key + (d + 1) * dim_stride, pairs);
    TOPT_UNROLL
    for (int m = 0; m < MT; ++m) {
      int pair;
      __builtin_memcpy(&pair, query + m * dim + d, sizeof(pair));
      const __m512bh q = (__m512bh)_mm512_set1_epi32(pair);
      TOPT_UNROLL
      for (int c = 0; c < 2 * C; ++c) acc[m][c] = _mm512_dpbf16_ps(acc[m][c], (__m512bh)pairs[c], q);
    }
  }
  TOPT_UNROLL
  for (int m = 0; m < MT; ++m) {
    columns.reorder(acc[m]);
    TOPT_UNROLL
    for (int c = 0; c < 2 * C; ++c) _mm512_storeu_ps(scores + m * score_stride + c * kLanes, acc[m][c]);
  }
}
#endif

// MT vectors and all tokens, from token `t` on.
template <int MT, typename T>
inline void score_vectors(const Queries& q, int first, const T* key, int64_t dim_stride, int t, int tokens,
                          float* scores, int64_t score_stride, int passes, Asks& asks) {
  const float* wide = q.wide + static_cast<int64_t>(first) * q.dim;
  float* out = scores + first * score_stride;
  constexpr int columns = kTileColumns<MT>;
  constexpr int bytes = kLanes * static_cast<int>(sizeof(T));
  if (asks.at) asks.bytes = bytes_to_ask(columns * bytes, passes);
  for (; t + columns * kLanes <= tokens; t += columns * kLanes) {
    score_tile<MT, columns>(wide, q.dim, key + t, dim_stride, out + t, score_stride, asks);
  }
  if (asks.at) asks.bytes = bytes_to_ask(bytes, passes);
  for (; t < tokens; t += kLanes) {
    score_tile<MT, 1>(wide, q.dim, key + t, dim_stride, out + t, score_stride, asks);
  }
}

#if TOPT_BF16_DOT
template <int MT, int C, typename T>
inline void score_pairs(const Queries& q, int first, const T* key, int64_t dim_stride, int tokens, float* scores,
                        int64_t score_stride, int passes, Asks& asks) {
  const c10::BFloat16* pairs = q.pairs + static_cast<int64_t>(first) * q.dim;
  float* out = scores + first * score_stride;
  constexpr int bytes = 2 * static_cast<int>(sizeof(T));  // of a token's pair
  int t = 0;
  if (asks.at) asks.bytes = bytes_to_ask(bytes * 32 * C, passes);
  for (; t + 32 * C <= tokens; t += 32 * C) {
    score_tile_pairs<MT, C>(pairs, q.dim, key + t, dim_stride, out + t, score_stride, asks);
  }
  if constexpr (!kIsByte<T>) {
    if (asks.at) asks.bytes = bytes_to_ask(bytes * 32, passes);
    for (; t + 32 <= tokens; t += 32) {
      score_tile_pairs<MT, 1>(pairs, q.dim, key + t, dim_stride, out + t, score_stride, asks);
    }
  }
  score_vectors<MT>(q, first, key, dim_stride, t, tokens, scores, score_stride, passes, asks);
}

// Register tiles of up to `most` vectors by 32 C tokens.
template <int most, int C, typename T>
inline void score_by_pairs(const Queries& q, const T* key, int64_t dim_stride, int tokens, float* scores,
                           int64_t score_stride, Asks asks) {
  in_passes<most>(q.count, asks, [&](auto vectors, int m, int passes, Asks& asks) {
    score_pairs<vectors(), C>(q, m, key, dim_stride, tokens, scores, score_stride, passes, asks);
  });
}
#endif

// scores[m, t] = q_m · k_t for t < tokens, a multiple of 16; garbage slots give garbage scores. `next` is the block to
// ask for meanwhile, or null; `tiles` the registers to take, or null.
template <typename T>
inline void score_block(const Queries& q, const T* key, int64_t dim_stride, int tokens, float* scores,
                        int64_t score_stride, const T* next, TileRegisters* tiles) {
  Asks asks(next);
#if TOPT_AMX
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    if (tiles) {
      if (asks.at) asks.bytes = bytes_to_ask(4 * kLanes * tiles_of(tokens), 1);
      return score_by_tiles(q.pairs, q.count, q.dim, key, dim_stride, tokens, scores, score_stride, asks, *tiles);
    }
  }
#endif
#if TOPT_BF16_DOT
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    if (q.pairs && q.count >= kManyVectors) {
      return score_by_pairs<kMostTileRows, 2>(q, key, dim_stride, tokens, scores, score_stride, asks);
    }
    // As wide as blocks are: K in the order of its addresses.
    if (q.pairs) return score_by_pairs<2, 4>(q, key, dim_stride, tokens, scores, score_stride, asks);
  }
#endif
#if TOPT_BF16_DOT && TOPT_BYTE_TABLES
  if constexpr (kIsByte<T>) {
    if (q.pairs) return score_by_pairs<kTileRows, 2>(q, key, dim_stride, tokens, scores, score_stride, asks);
  }
#endif
  in_passes<kScoreRows>(q.count, asks, [&](auto vectors, int m, int passes, Asks& asks) {
    score_vectors<vectors()>(q, m, key, dim_stride, 0, tokens, scores, score_stride, passes, asks);
  });
}

}  // namespace topt
