// Products of bfloat16 by AMX, for scores and for sums of V rows: 16 query vectors take as long as one, so those of large
// groups, and rows of a sequence that are decoded together, share what is done for K and V.
//
// A product is C [M, 16] += A [M, 32] B [32, 16] in float32, M up to 16. Vectors are A; B, of cached rows, lies in pairs of
// rows, [16, 16, 2].
#pragma once

#include <algorithm>
#include <type_traits>

#include "accumulate.h"
#include "ahead.h"
#include "vector.h"

#if TOPT_AVX512 && defined(__AVX512BF16__) && defined(__AMX_BF16__)
#define TOPT_AMX 1
#include "tile_registers.h"
#else
#define TOPT_AMX 0
#endif

namespace topt {

constexpr int kTileDepth = 32;
// Fewer vectors take as long without tiles: memory bounds them.
constexpr int kLeastTileVectors = 5;

#if TOPT_AMX

constexpr int kTileVectors = 16;
// Tiles of C side by side, of 16 columns each.
constexpr int kTiles = 4;

// A thread's tile registers while this lives: 0 to 3 for C, 4 and 5 for A, which have a row for each vector, and 6 for B.
class TileRegisters {
 public:
  ~TileRegisters() {
    if (vectors) release_tiles();
  }
  void shape(int wanted) {
    if (wanted == vectors) return;
    vectors = wanted;
    TileShapes shapes{};
    shapes.palette = 1;
    for (int tile = 0; tile < 7; ++tile) {
      shapes.row_bytes[tile] = 64, shapes.rows[tile] = static_cast<uint8_t>(tile < 6 ? vectors : kTileDepth / 2);
    }
    configure_tiles(shapes);
  }

 private:
  int vectors = 0;
};

// Tiles that so many columns fill, or all.
inline int tiles_of(int columns) { return std::min(kTiles, columns / kLanes); }

// Visits the first `count` tiles of C: visit(integral_constant of its number).
template <typename F>
TOPT_INLINE void each_tile(int count, F&& visit) {
  visit(std::integral_constant<int, 0>());
  if (count > 1) visit(std::integral_constant<int, 1>());
  if (count > 2) visit(std::integral_constant<int, 2>());
  if (count > 3) visit(std::integral_constant<int, 3>());
}

// Tiles of B on their way to a register.
struct Pairs {
  alignas(64) c10::BFloat16 tile[kTiles][kTileDepth * kLanes];

  // Two rows, 16 elements for each tile, as row `index` of the tiles; null is a row of zeros.
  TOPT_INLINE void write(const c10::BFloat16* first, const c10::BFloat16* second, int tiles, int index) {
    const __m512i low = _mm512_setr_epi32(0x200000, 0x210001, 0x220002, 0x230003, 0x240004, 0x250005, 0x260006, 0x270007,
                                          0x280008, 0x290009, 0x2a000a, 0x2b000b, 0x2c000c, 0x2d000d, 0x2e000e, 0x2f000f);
    const __m512i high = _mm512_add_epi32(low, _mm512_set1_epi32(0x100010));
    for (int t = 0; t < tiles; t += 2) {
      const __mmask32 present = t + 1 < tiles ? 0xffffffff : 0xffff;
      const auto load = [&](const c10::BFloat16* row) {
        return row ? _mm512_maskz_loadu_epi16(present, row + t * kLanes) : _mm512_setzero_si512();
      };
      const __m512i a = load(first), b = load(second);
      _mm512_store_si512(tile[t] + 2 * kLanes * index, _mm512_permutex2var_epi16(a, low, b));
      if (t + 1 < tiles) _mm512_store_si512(tile[t + 1] + 2 * kLanes * index, _mm512_permutex2var_epi16(a, high, b));
    }
  }
};

// scores[m, t] = q_m · k_t for t < tokens, a multiple of 16.
//   query  [M, D], D a multiple of 32
//   key    [D, tokens]
inline void score_by_tiles(const c10::BFloat16* query, int vectors, int dim, const c10::BFloat16* key,
                           int64_t dim_stride, int tokens, float* scores, int64_t score_stride, Asks& asks,
                           TileRegisters& registers) {
  Pairs pairs;
  for (int t = 0; t < tokens; t += kTiles * kLanes) {
    const int tiles = tiles_of(tokens - t);
    for (int m = 0; m < vectors; m += kTileVectors) {
      registers.shape(std::min(kTileVectors, vectors - m));
      each_tile(kTiles, [](auto tile) { clear_tile<tile()>(); });
      for (int d = 0; d < dim; d += kTileDepth) {
        const c10::BFloat16* row = key + d * dim_stride + t;
        for (int i = 0; i < kTileDepth / 2; ++i, row += 2 * dim_stride) {
          if (m == 0) asks.step();
          pairs.write(row, row + dim_stride, tiles, i);
        }
        load_tile<4>(query + static_cast<int64_t>(m) * dim + d, 2 * dim);
        each_tile(tiles, [&](auto tile) {
          load_tile<6>(pairs.tile[tile()], 64);
          multiply_tiles<tile(), 4, 6>();
        });
      }
      float* to = scores + m * score_stride + t;
      each_tile(tiles, [&](auto tile) { store_tile<tile()>(to + kLanes * tile(), 4 * score_stride); });
    }
  }
}

// Weights as A: two bfloat16 together hold 16 of their bits.
struct SplitWeights {
  alignas(64) c10::BFloat16 first[kTileVectors][kTileDepth], second[kTileVectors][kTileDepth];

  // Of M vectors for `count` rows, zeros behind them.
  TOPT_INLINE void write(const float* weights, int64_t stride, int vectors, int count) {
    const auto low = static_cast<__mmask16>(below(count)), high = static_cast<__mmask16>(below(count - kLanes));
    for (int m = 0; m < vectors; ++m, weights += stride) {
      const __m512 a = _mm512_maskz_loadu_ps(low, weights), b = _mm512_maskz_loadu_ps(high, weights + kLanes);
      const auto rounded = (__m512i)_mm512_cvtne2ps_pbh(b, a);
      const auto rest = [](const __m512& exact, __m256i half) {
        return _mm512_sub_ps(exact, _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(half), 16)));
      };
      const __m512 of_a = rest(a, _mm512_castsi512_si256(rounded)), of_b = rest(b, _mm512_extracti64x4_epi64(rounded, 1));
      _mm512_store_si512(first[m], rounded);
      _mm512_store_si512(second[m], (__m512i)_mm512_cvtne2ps_pbh(of_b, of_a));
    }
  }
};

// As accumulate; D a multiple of 32.
inline void accumulate_by_tiles(float* acc, int vectors, int dim, const float* weights, int64_t weight_stride,
                                const c10::BFloat16* const* rows, int count, bool ask_rows, TileRegisters& registers) {
  Pairs pairs;
  SplitWeights split;
  for (int m = 0; m < vectors; m += kTileVectors) {
    const int here = std::min(kTileVectors, vectors - m);
    registers.shape(here);
    for (int d = 0; d < dim; d += kTiles * kLanes) {
      const int tiles = tiles_of(dim - d);
      float* sums = acc + static_cast<int64_t>(m) * dim + d;
      each_tile(tiles, [&](auto tile) { load_tile<tile()>(sums + kLanes * tile(), 4 * dim); });
      for (int i = 0; i < count; i += kTileDepth) {
        const int left = count - i;
        split.write(weights + m * weight_stride + i, weight_stride, here, left);
        for (int j = 0; j < kTileDepth; j += 2) {
          const auto row = [&](int at) { return at < left ? rows[i + at] + d : nullptr; };
          for (int k = j + kRowsAhead; ask_rows && m == 0 && k < std::min(j + kRowsAhead + 2, left); ++k) {
            for (int column = 0; column < tiles * kLanes; column += kTileDepth) ask(rows[i + k] + d + column);
          }
          pairs.write(row(j), row(j + 1), tiles, j / 2);
        }
        load_tile<4>(split.first, 64), load_tile<5>(split.second, 64);
        each_tile(tiles, [&](auto tile) {
          load_tile<6>(pairs.tile[tile()], 64);
          multiply_tiles<tile(), 4, 6>();
          multiply_tiles<tile(), 5, 6>();
        });
      }
      each_tile(tiles, [&](auto tile) { store_tile<tile()>(sums + kLanes * tile(), 4 * dim); });
    }
  }
}

#else

struct TileRegisters {};

#endif

}  // namespace topt
