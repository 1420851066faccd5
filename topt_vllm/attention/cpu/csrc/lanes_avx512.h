// Operations on sixteen floats that at::vec lacks, or does more slowly: AVX-512.
#pragma once

#include "vec16.h"

namespace topt {

inline Vec16 load16(const c10::BFloat16* source) {
  const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source));
  return Vec16(Vec(_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(raw), 16))));
}

inline Vec16 load16(const c10::Half* source) {
  return Vec16(Vec(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(source)))));
}

// Four numbers, again and again.
inline Vec16 repeated16(const c10::Half* const (&from)[4]) {
  const __m128i four = _mm_setr_epi16(from[0]->x, from[1]->x, from[2]->x, from[3]->x, 0, 0, 0, 0);
  return Vec16(Vec(_mm512_broadcast_f32x4(_mm_cvtph_ps(four))));
}

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

}  // namespace topt
