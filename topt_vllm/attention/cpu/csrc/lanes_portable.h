// As lanes_avx512.h, which has the comments, by the compiler.
#pragma once

#include "vec16.h"

namespace topt {

inline Vec16 load16(const c10::BFloat16* source) {
  Vec16 out;
  for (int i = 0; i < kParts; ++i) at::vec::load_to_float(source + i * Vec::size(), out[i]);
  return out;
}

inline Vec16 load16(const c10::Half* source) {
  Vec16 out;
  for (int i = 0; i < kParts; ++i) at::vec::load_to_float(source + i * Vec::size(), out[i]);
  return out;
}

// Four numbers, again and again.
inline Vec16 repeated16(const c10::Half* const (&from)[4]) {
  alignas(64) float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = i < 4 ? static_cast<float>(*from[i]) : lanes[i - 4];
  return load16(lanes);
}

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
  return Vec16::of([&](int i) { return Vec::blendv(b[i], a[i], a[i] > b[i]); });
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

}  // namespace topt
