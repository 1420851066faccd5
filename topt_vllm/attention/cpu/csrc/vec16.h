// Sixteen floats in one or more registers, with what at::vec has for them.
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
#elif defined(CPU_CAPABILITY_AVX2)
#include <immintrin.h>
#define TOPT_AVX2 1
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
  // Without a constructor where it can be: the loop that would set an array of them to zero keeps it in memory for good.
#if TOPT_AVX512
  using Part = __m512;
#elif TOPT_AVX2
  using Part = __m256;
#else
  using Part = Vec;
#endif
  Part part[kParts];

  Vec16() = default;
  // Only where one vector has all lanes.
  template <int parts = kParts>
    requires(parts == 1)
  explicit Vec16(Vec whole) : part{whole} {}
  // Only where two have.
  template <int parts = kParts>
    requires(parts == 2)
  Vec16(Vec lower, Vec upper) : part{lower, upper} {}
  explicit Vec16(float lane) {
    for (Part& v : part) v = Vec(lane);
  }
  Part& operator[](int i) { return part[i]; }
  Vec operator[](int i) const { return part[i]; }

  template <typename F>
  static Vec16 of(F each) {
    Vec16 out;
    TOPT_UNROLL
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

inline Vec16 load16(const float* source) {
  return Vec16::of([&](int i) { return Vec::loadu(source + i * Vec::size()); });
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

}  // namespace topt
