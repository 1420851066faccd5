// Sixteen floats at a time: at::vec where it has the operation, intrinsics where it lacks one or where one pays.
#pragma once

#include <type_traits>

#include "vec16.h"

#if TOPT_AVX512
#include "lanes_avx512.h"
#elif TOPT_AVX2
#include "lanes_avx2.h"
#else
#include "lanes_portable.h"
#endif

namespace topt {

// Register tiles: accumulators of [vectors, 16-lane columns] that fit the register file, the most vectors where little
// else is in it, and so many for scores. With 16 registers of eight lanes fewer vectors have more columns: whole lines of
// 16-bit K or V, and eight sums at least, for as many multiplications are under way.
#if TOPT_AVX512
constexpr int kTileRows = 4, kMostTileRows = 6, kScoreRows = 4;
template <int rows>
constexpr int kTileColumns = 4;
#elif TOPT_AVX2
constexpr int kTileRows = 4, kMostTileRows = 4, kScoreRows = 3;
template <int rows>
constexpr int kTileColumns = rows == 1 ? 4 : rows < 4 ? 2 : 1;
#else
constexpr int kTileRows = 4, kMostTileRows = 4, kScoreRows = 4;
template <int rows>
constexpr int kTileColumns = 1;
#endif

// visit(integral_constant of `size`, first), for sizes up to `most`.
template <int most, typename F>
TOPT_INLINE void visit_tile(int size, int first, F&& visit) {
  if constexpr (most > 1) {
    if (size < most) return visit_tile<most - 1>(size, first, visit);
  }
  visit(std::integral_constant<int, most>(), first);
}

// Visits `count` vectors in parts of at most `most`: visit(integral_constant of the part's size, its first vector). The
// last two are of about one size.
template <int most = kTileRows, typename F>
inline void in_register_tiles(int count, F&& visit) {
  for (int first = 0; first < count;) {
    const int left = count - first, size = left <= most ? left : left < 2 * most ? (left + 1) / 2 : most;
    visit_tile<most>(size, first, visit);
    first += size;
  }
}

// Lanes whose index is below `limit`.
inline uint32_t below(int limit) { return limit >= kLanes ? 0xffffu : limit <= 0 ? 0u : (1u << limit) - 1; }

inline Vec16 softcap16(const Vec16& v, float cap) {
  return Vec16::of([&](int i) { return (v[i] / Vec(cap)).tanh() * Vec(cap); });
}

}  // namespace topt
