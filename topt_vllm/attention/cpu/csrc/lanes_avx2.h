// As lanes_avx512.h, which has the comments, in two registers of eight.
#pragma once

#include <array>

#include "vec16.h"

namespace topt {

inline __m256 bfloat_to_float(__m128i raw) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(raw), 16));
}

inline __m128i load8(const void* source) { return _mm_loadu_si128(static_cast<const __m128i*>(source)); }

inline Vec16 load16(const c10::BFloat16* source) {
  return {bfloat_to_float(load8(source)), bfloat_to_float(load8(source + 8))};
}

inline Vec16 load16(const c10::Half* source) {
  return {_mm256_cvtph_ps(load8(source)), _mm256_cvtph_ps(load8(source + 8))};
}

inline Vec16 repeated16(const c10::Half* const (&from)[4]) {
  const __m128 four = _mm_cvtph_ps(_mm_setr_epi16(from[0]->x, from[1]->x, from[2]->x, from[3]->x, 0, 0, 0, 0));
  return {_mm256_set_m128(four, four), _mm256_set_m128(four, four)};
}

template <int predicate>
inline uint32_t compare16(const Vec16& v, float limit) {
  const __m256 all = _mm256_set1_ps(limit);
  const int low = _mm256_movemask_ps(_mm256_cmp_ps(v[0], all, predicate));
  const int high = _mm256_movemask_ps(_mm256_cmp_ps(v[1], all, predicate));
  return static_cast<uint32_t>(low | high << 8);
}

inline uint32_t ge16(const Vec16& v, float limit) { return compare16<_CMP_GE_OQ>(v, limit); }

inline uint32_t not_below16(const Vec16& v, float limit) { return compare16<_CMP_NLT_UQ>(v, limit); }

// For every mask of eight lanes: its lanes, a byte each, then zeros. Instructions that do without a table take hundreds of
// cycles on some CPUs (pext before Zen 3).
inline constexpr auto kListedLanes = [] {
  std::array<uint64_t, 256> listed{};
  for (int mask = 0; mask < 256; ++mask) {
    for (int lane = 0, count = 0; lane < 8; ++lane) {
      if (mask >> lane & 1) listed[mask] |= static_cast<uint64_t>(lane) << 8 * count++;
    }
  }
  return listed;
}();

inline __m256i listed_lanes(uint32_t mask) {
  return _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(&kListedLanes[mask])));
}

inline int list_lanes(uint32_t mask, int first, int32_t* list) {
  const uint32_t low = mask & 0xff, high = mask >> 8;
  const int count = std::popcount(low);
  const auto store = [](int32_t* to, __m256i lanes, int first) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_add_epi32(lanes, _mm256_set1_epi32(first)));
  };
  store(list, listed_lanes(low), first);
  store(list + count, listed_lanes(high), first + 8);
  return count + std::popcount(high);
}

// All bits of the lanes of `mask`, and none of the others.
inline Vec16 lanes_of(uint32_t mask) {
  const __m256i all = _mm256_set1_epi32(static_cast<int>(mask));
  const auto part = [&](__m256i bits) {
    return _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(all, bits), bits));
  };
  return {part(_mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128)),
          part(_mm256_setr_epi32(256, 512, 1024, 2048, 4096, 8192, 16384, 32768))};
}

inline Vec16 select16(const Vec16& v, uint32_t mask, float fill) {
  const Vec16 lanes = lanes_of(mask);
  return Vec16::of([&](int i) { return _mm256_blendv_ps(_mm256_set1_ps(fill), v[i], lanes[i]); });
}

inline Vec16 max16(const Vec16& a, const Vec16& b) {
  return Vec16::of([&](int i) { return _mm256_max_ps(a[i], b[i]); });
}

inline Vec16 max_lanes16(const Vec16& best, uint32_t mask, const Vec16& v) {
  const Vec16 lanes = lanes_of(mask);
  return Vec16::of([&](int i) { return _mm256_max_ps(_mm256_blendv_ps(best[i], v[i], lanes[i]), best[i]); });
}

inline float max_lane16(const Vec16& v) {
  const __m256 eight = _mm256_max_ps(v[0], v[1]);
  const __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  const __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(two, _mm_shuffle_ps(two, two, 1)));
}

template <int distance>
inline Vec16 butterflies16(const Vec16& v) {
  if constexpr (distance == 8) {
    return {_mm256_add_ps(v[0], v[1]), _mm256_sub_ps(v[0], v[1])};
  } else {
    // One bit for each lane whose index has `distance` in it.
    constexpr int upper = distance == 1 ? 0xaa : distance == 2 ? 0xcc : 0xf0;
    return Vec16::of([&](int i) {
      const __m256 part = v[i];
      const __m256 swapped = distance == 4 ? _mm256_permute2f128_ps(part, part, 1)
                                           : _mm256_permute_ps(part, distance == 1 ? 0xb1 : 0x4e);
      return _mm256_blend_ps(_mm256_add_ps(part, swapped), _mm256_sub_ps(swapped, part), upper);
    });
  }
}

inline Vec16 add_lanes16(const Vec16& sum, uint32_t mask, const Vec16& v) {
  const Vec16 lanes = lanes_of(mask);
  return Vec16::of([&](int i) { return _mm256_add_ps(sum[i], _mm256_and_ps(v[i], lanes[i])); });
}

// Below -87 the result would leave the normal range, and is 0.
inline __m256 exp8(__m256 x) {
  const __m256 log2e = _mm256_set1_ps(1.44269504f), least = _mm256_set1_ps(-87.0f);
  const __m256 v = _mm256_max_ps(least, x);
  const __m256 n = _mm256_round_ps(_mm256_mul_ps(v, log2e), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m256 f = _mm256_fmsub_ps(v, log2e, n);
  __m256 poly = _mm256_set1_ps(1.3276471737e-3f);
  poly = _mm256_fmadd_ps(poly, f, _mm256_set1_ps(9.6755415401e-3f));
  poly = _mm256_fmadd_ps(poly, f, _mm256_set1_ps(5.5507132761e-2f));
  poly = _mm256_fmadd_ps(poly, f, _mm256_set1_ps(2.4022119720e-1f));
  poly = _mm256_fmadd_ps(poly, f, _mm256_set1_ps(6.9314696706e-1f));
  poly = _mm256_fmadd_ps(poly, f, _mm256_set1_ps(1.0000000717f));
  // Times 2^n by its exponent; that of a NaN stays.
  const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
  const __m256 scaled = _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(poly), exponent));
  return _mm256_and_ps(scaled, _mm256_cmp_ps(x, least, _CMP_NLT_UQ));
}

inline Vec16 exp16(const Vec16& x) { return {exp8(x[0]), exp8(x[1])}; }

inline void split16(const Vec16& p, uint32_t read, uint32_t used, Vec16& used_sum, Vec16& dropped_sum,
                    float* target) {
  if ((read & used) == 0xffff) {
    used_sum = used_sum + p;
    store16(target, p);
    return;
  }
  const Vec16 lanes = lanes_of(used);
  const Vec16 kept = Vec16::of([&](int i) { return _mm256_and_ps(p[i], lanes[i]); });
  used_sum = used_sum + kept;
  dropped_sum = dropped_sum + Vec16::of([&](int i) { return _mm256_andnot_ps(lanes[i], p[i]); });
  if (!read) return;
  const uint32_t low = read & 0xff;
  _mm256_storeu_ps(target, _mm256_permutevar8x32_ps(kept[0], listed_lanes(low)));
  _mm256_storeu_ps(target + std::popcount(low), _mm256_permutevar8x32_ps(kept[1], listed_lanes(read >> 8)));
}

}  // namespace topt
