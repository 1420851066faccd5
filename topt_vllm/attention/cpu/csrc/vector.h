// Sixteen floats at a time: at::vec where it has the operation, intrinsics where it lacks one or where one pays.
#pragma once

#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <type_traits>

#if defined(CPU_CAPABILITY_AVX512)
#include <immintrin.h>
#define TOPT_AVX512 1
#endif

// Loops over register tiles: rolled, the compiler keeps their accumulators in memory (2.3 times slower).
#define TOPT_UNROLL _Pragma("GCC unroll 8")
// Parts of inner loops that the compiler would call.
#define TOPT_INLINE [[gnu::always_inline]] inline

namespace topt {

constexpr int kLanes = 16;
constexpr float kInfinity = std::numeric_limits<float>::infinity();

using Vec = at::vec::Vectorized<float>;
constexpr int kParts = kLanes / Vec::size();

// Like at::vec::VectorizedN, whose arrays the compiler does not keep in registers.
struct Vec16 {
  // Without a constructor where one vector has all lanes: the loop that would set an array of them to zero keeps it in
  // memory for good.
#if TOPT_AVX512
  using Part = __m512;
#else
  using Part = Vec;
#endif
  Part part[kParts];

  Vec16() = default;
  // Only where one vector has all lanes.
  template <int parts = kParts>
    requires(parts == 1)
  explicit Vec16(Vec whole) : part{whole} {}
  explicit Vec16(float lane) {
    for (Part& v : part) v = Vec(lane);
  }
  Part& operator[](int i) { return part[i]; }
  Vec operator[](int i) const { return part[i]; }

  template <typename F>
  static Vec16 of(F each) {
    Vec16 out;
    for (int i = 0; i < kParts; ++i) out.part[i] = each(i);
    return out;
  }
  friend Vec16 operator+(const Vec16& a, const Vec16& b) {
    return of([&](int i) { return a[i] + b[i]; });
  }
  friend Vec16 operator-(const Vec16& a, const Vec16& b) {
    return of([&](int i) { return a[i] - b[i]; });
  }
  friend Vec16 operator*(const Vec16& a, const Vec16& b) {
    return of([&](int i) { return a[i] * b[i]; });
  }
};

// Register tiles: accumulators of [vectors, 16-lane columns] that fit the register file, the most of them where little
// else is in it.
#if TOPT_AVX512
constexpr int kTileRows = 4, kMostTileRows = 6, kTileColumns = 4;
#else
constexpr int kTileRows = 4, kMostTileRows = 4, kTileColumns = 1;
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

inline Vec16 load16(const float* source) {
  return Vec16::of([&](int i) { return Vec::loadu(source + i * Vec::size()); });
}

inline Vec16 load16(const c10::BFloat16* source) {
#if TOPT_AVX512
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
  return Vec16(Vec(_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16))));
#else
  Vec16 out;
  for (int i = 0; i < kParts; ++i) at::vec::load_to_float(source + i * Vec::size(), out[i]);
  return out;
#endif
}

inline Vec16 load16(const c10::Half* source) {
#if TOPT_AVX512
  return Vec16(Vec(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)))));
#else
  Vec16 out;
  for (int i = 0; i < kParts; ++i) at::vec::load_to_float(source + i * Vec::size(), out[i]);
  return out;
#endif
}

// Four numbers, again and again.
inline Vec16 repeated16(const c10::Half* const (&from)[4]) {
#if TOPT_AVX512
  const __m128i four = _mm_setr_epi16(from[0]->x, from[1]->x, from[2]->x, from[3]->x, 0, 0, 0, 0);
  return Vec16(Vec(_mm512_broadcast_f32x4(_mm_cvtph_ps(four))));
#else
  alignas(64) float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = i < 4 ? static_cast<float>(*from[i]) : lanes[i - 4];
  return load16(lanes);
#endif
}

inline void store16(float* target, const Vec16& v) {
  for (int i = 0; i < kParts; ++i) v[i].store(target + i * Vec::size());
}

inline Vec16 fma16(const Vec16& a, const Vec16& b, const Vec16& c) {
  return Vec16::of([&](int i) { return at::vec::fmadd(a[i], b[i], c[i]); });
}

inline float sum16(const Vec16& v) {
  alignas(64) float lanes[kLanes];
  store16(lanes, v);
  // Pairwise, so that every capability adds in the same order.
  for (int width = kLanes / 2; width; width /= 2) {
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  }
  return lanes[0];
}

#if TOPT_AVX512

// Lanes that are >= limit; a NaN lane is not.
inline uint32_t ge16(const Vec16& v, float limit) {
  return _mm512_cmp_ps_mask(v[0], _mm512_set1_ps(limit), _CMP_GE_OQ);
}

// Lanes that are not below limit; a NaN lane is not below.
inline uint32_t not_below16(const Vec16& v, float limit) {
  return _mm512_cmp_ps_mask(v[0], _mm512_set1_ps(limit), _CMP_NLT_UQ);
}

// Writes first + lane of every lane of `mask` to `list`, which has room for 16; returns how many. No branch: which lanes
// are in the mask can't be foretold.
inline int list_lanes(uint32_t mask, int first, int32_t* list) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i places = _mm512_add_epi32(lane, _mm512_set1_epi32(first));
  _mm512_storeu_si512(list, _mm512_maskz_compress_epi32(static_cast<__mmask16>(mask), places));
  return std::popcount(mask);
}

// Lanes outside `mask` become `fill`.
inline Vec16 select16(const Vec16& v, uint32_t mask, float fill) {
  return Vec16(Vec(_mm512_mask_mov_ps(_mm512_set1_ps(fill), static_cast<__mmask16>(mask), v[0])));
}

// Larger of the two; `b` where either is NaN.
inline Vec16 max16(const Vec16& a, const Vec16& b) { return Vec16(Vec(_mm512_max_ps(a[0], b[0]))); }

// The same in the lanes `mask` of v; others of `best` stay.
inline Vec16 max_lanes16(const Vec16& best, uint32_t mask, const Vec16& v) {
  return Vec16(Vec(_mm512_mask_max_ps(best[0], static_cast<__mmask16>(mask), v[0], best[0])));
}

inline float max_lane16(const Vec16& v) { return _mm512_reduce_max_ps(v[0]); }

// Sums, and differences, of lanes at a distance.
template <int distance>
inline Vec16 butterflies16(const Vec16& v) {
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i other = _mm512_xor_si512(lane, _mm512_set1_epi32(distance));
  const __mmask16 upper = _mm512_test_epi32_mask(lane, _mm512_set1_epi32(distance));
  const __m512 swapped = _mm512_permutexvar_ps(other, v[0]);
  return Vec16(Vec(_mm512_mask_sub_ps(_mm512_add_ps(v[0], swapped), upper, swapped, v[0])));
}

// Adds the lanes `mask` of v.
inline Vec16 add_lanes16(const Vec16& sum, uint32_t mask, const Vec16& v) {
  return Vec16(Vec(_mm512_mask_add_ps(sum[0], static_cast<__mmask16>(mask), sum[0], v[0])));
}

// exp for x <= 88, relative error below 3e-7; NaN stays NaN and -inf gives 0.
inline Vec16 exp16(const Vec16& x) {
  // 2^n 2^f with |f| <= 1/2. The limit is the first operand: _mm512_max_ps returns the second when either is NaN.
  const __m512 v = _mm512_max_ps(_mm512_set1_ps(-104.0f), x[0]);
  const __m512 log2e = _mm512_set1_ps(1.44269504f);
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(v, log2e), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 f = _mm512_fmsub_ps(v, log2e, n);
  __m512 poly = _mm512_set1_ps(1.3276471737e-3f);
  poly = _mm512_fmadd_ps(poly, f, _mm512_set1_ps(9.6755415401e-3f));
  poly = _mm512_fmadd_ps(poly, f, _mm512_set1_ps(5.5507132761e-2f));
  poly = _mm512_fmadd_ps(poly, f, _mm512_set1_ps(2.4022119720e-1f));
  poly = _mm512_fmadd_ps(poly, f, _mm512_set1_ps(6.9314696706e-1f));
  poly = _mm512_fmadd_ps(poly, f, _mm512_set1_ps(1.0000000717f));
  return Vec16(Vec(_mm512_scalef_ps(poly, n)));
}

// Splits probabilities into used and dropped sums, and writes those of the `read` lanes, zero where unused, to
// target[0 .. popcount(read)). Up to 16 floats are written there.
inline void split16(const Vec16& p, uint32_t read, uint32_t used, Vec16& used_sum, Vec16& dropped_sum,
                    float* target) {
  if ((read & used) == 0xffff) {
    used_sum = used_sum + p;
    store16(target, p);
    return;
  }
  const auto use = static_cast<__mmask16>(used);
  const __m512 kept = _mm512_maskz_mov_ps(use, p[0]);
  used_sum = Vec16(Vec(_mm512_add_ps(used_sum[0], kept)));
  dropped_sum = Vec16(Vec(_mm512_mask_add_ps(dropped_sum[0], _knot_mask16(use), dropped_sum[0], p[0])));
  // Compress in a register and store: the compressing store is microcoded on Zen 4.
  if (read) _mm512_storeu_ps(target, _mm512_maskz_compress_ps(static_cast<__mmask16>(read), kept));
}

#else

inline uint32_t ge16(const Vec16& v, float limit) {
  alignas(64) float lanes[kLanes];
  store16(lanes, v);
  uint32_t mask = 0;
  for (int i = 0; i < kLanes; ++i) mask |= static_cast<uint32_t>(lanes[i] >= limit) << i;
  return mask;
}

inline uint32_t not_below16(const Vec16& v, float limit) {
  alignas(64) float lanes[kLanes];
  store16(lanes, v);
  uint32_t mask = 0;
  for (int i = 0; i < kLanes; ++i) mask |= static_cast<uint32_t>(!(lanes[i] < limit)) << i;
  return mask;
}

inline Vec16 select16(const Vec16& v, uint32_t mask, float fill) {
  if (mask == 0xffff) return v;
  alignas(64) float lanes[kLanes];
  store16(lanes, v);
  for (int i = 0; i < kLanes; ++i) lanes[i] = (mask >> i & 1) ? lanes[i] : fill;
  return load16(lanes);
}

inline Vec16 max16(const Vec16& a, const Vec16& b) {
  return Vec16::of([&](int i) { return at::vec::maximum(a[i], b[i]); });
}

inline Vec16 max_lanes16(const Vec16& best, uint32_t mask, const Vec16& v) {
  return max16(select16(v, mask, -kInfinity), best);
}

inline float max_lane16(const Vec16& v) {
  alignas(64) float lanes[kLanes];
  store16(lanes, v);
  float best = lanes[0];
  for (int i = 1; i < kLanes; ++i) best = lanes[i] > best ? lanes[i] : best;
  return best;
}

template <int distance>
inline Vec16 butterflies16(const Vec16& v) {
  alignas(64) float lanes[kLanes];
  store16(lanes, v);
  for (int first = 0; first < kLanes; first += 2 * distance) {
    for (int i = first; i < first + distance; ++i) {
      const float low = lanes[i], high = lanes[i + distance];
      lanes[i] = low + high, lanes[i + distance] = low - high;
    }
  }
  return load16(lanes);
}

inline int list_lanes(uint32_t mask, int first, int32_t* list) {
  int count = 0;
  for (; mask; mask &= mask - 1) list[count++] = first + std::countr_zero(mask);
  return count;
}

inline Vec16 add_lanes16(const Vec16& sum, uint32_t mask, const Vec16& v) { return sum + select16(v, mask, 0.0f); }

inline Vec16 exp16(const Vec16& x) {
  return Vec16::of([&](int i) { return x[i].exp(); });
}

inline void split16(const Vec16& p, uint32_t read, uint32_t used, Vec16& used_sum, Vec16& dropped_sum,
                    float* target) {
  if (used == 0xffff) {
    used_sum = used_sum + p;
    store16(target, p);
    return;
  }
  if (!read) {
    dropped_sum = dropped_sum + p;
    return;
  }
  const Vec16 kept = select16(p, used, 0.0f);
  used_sum = used_sum + kept;
  dropped_sum = dropped_sum + select16(p, ~used & 0xffff, 0.0f);
  alignas(64) float lanes[kLanes];
  store16(lanes, kept);
  for (uint32_t left = read; left; left &= left - 1) *target++ = lanes[std::countr_zero(left)];
}

#endif

inline Vec16 softcap16(const Vec16& v, float cap) {
  return Vec16::of([&](int i) { return (v[i] / Vec(cap)).tanh() * Vec(cap); });
}

}  // namespace topt
