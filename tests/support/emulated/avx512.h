// The AVX-512 instructions that the CPU kernel uses, as loops over lanes; see emulation.py. Semantics are those of the
// Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2. What is missing here doesn't compile.
#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#define __AVX512BF16__ 1
#define __AVX512VNNI__ 1
#define __AVX512VBMI__ 1
#ifdef TOPT_EMULATED_AMX
#define __AMX_BF16__ 1
#endif

namespace emulated {

// A register's lanes of a type.
template <typename T, int size = 64>
struct Lanes {
  static constexpr int count = size / sizeof(T);
  alignas(64) T lane[count] = {};
  Lanes() = default;
  template <typename V>
    requires(sizeof(V) == size)
  explicit Lanes(const V& v) {
    std::memcpy(lane, &v, size);
  }
  T& operator[](int i) { return lane[i]; }
  T operator[](int i) const { return lane[i]; }
  template <typename V>
    requires(sizeof(V) == size)
  operator V() const {
    V v;
    std::memcpy(&v, lane, size);
    return v;
  }
};

// f(lane of each operand ...) in every lane.
template <typename T, typename V, typename F>
V map(F f, const V& a) {
  Lanes<T, sizeof(V)> out(a);
  for (T& x : out.lane) x = f(x);
  return out;
}
template <typename T, typename V, typename F>
V map(F f, const V& a, const V& b) {
  Lanes<T, sizeof(V)> out(a);
  const Lanes<T, sizeof(V)> right(b);
  for (int i = 0; i < out.count; ++i) out[i] = f(out[i], right[i]);
  return out;
}
// f(lane number) in every lane.
template <typename V, typename T, typename F>
V generate(F f) {
  Lanes<T, sizeof(V)> out;
  for (int i = 0; i < out.count; ++i) out[i] = f(i);
  return out;
}
inline bool in(uint32_t mask, int lane) { return mask >> lane & 1; }

// Whole registers.
template <typename V>
V load(const void* from) {
  V v;
  std::memcpy(&v, from, sizeof(V));
  return v;
}
template <typename V>
void store(void* to, const V& v) {
  std::memcpy(to, &v, sizeof(V));
}
template <typename T>
auto all(T value) {
  return generate<std::conditional_t<std::is_same_v<T, float>, __m512, __m512i>, T>([=](int) { return value; });
}
template <typename... T>
__m512i listed(T... lanes) {
  const int32_t from[] = {lanes...};
  static_assert(sizeof(from) == 64);
  return load<__m512i>(from);
}
// The lower bytes of v; bytes beyond it are zero.
template <typename V, typename From>
V resized(const From& v) {
  V out{};
  std::memcpy(&out, &v, sizeof(V) < sizeof(From) ? sizeof(V) : sizeof(From));
  return out;
}
inline __m512 insert(__m512 v, __m256 half, int index) {
  std::memcpy(reinterpret_cast<char*>(&v) + 32 * index, &half, 32);
  return v;
}
inline __m256i extract(__m512i v, int index) { return load<__m256i>(reinterpret_cast<const char*>(&v) + 32 * index); }
inline __m512 repeated(__m128 v) {
  return generate<__m512, float>([four = Lanes<float, 16>(v)](int i) { return four[i % 4]; });
}

// Floats. Comparisons are false with a NaN, so that a maximum is its second operand then.
inline __m512 add(__m512 a, __m512 b) { return map<float>([](float x, float y) { return x + y; }, a, b); }
inline __m512 subtract(__m512 a, __m512 b) { return map<float>([](float x, float y) { return x - y; }, a, b); }
inline __m512 multiply(__m512 a, __m512 b) { return map<float>([](float x, float y) { return x * y; }, a, b); }
inline float larger(float x, float y) { return x > y ? x : y; }
inline __m512 maximum(__m512 a, __m512 b) { return map<float>(larger, a, b); }
inline __m512 fused(__m512 a, __m512 b, __m512 c) {
  return generate<__m512, float>([a = Lanes<float>(a), b = Lanes<float>(b), c = Lanes<float>(c)](int i) {
    return std::fma(a[i], b[i], c[i]);
  });
}
inline __m512 fused_minus(__m512 a, __m512 b, __m512 c) {
  return fused(a, b, map<float>([](float x) { return -x; }, c));
}
inline __m512 rounded(__m512 v, int how) {
  if (how != (_MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)) __builtin_trap();
  return map<float>([](float x) { return std::nearbyint(x); }, v);
}
inline __m512 scaled(__m512 v, __m512 exponents) {
  return map<float>([](float x, float e) { return std::isnan(e) ? e : std::ldexp(x, static_cast<int>(std::floor(e))); },
                    v, exponents);
}
inline __mmask16 compared(__m512 a, __m512 b, int how) {
  if (how != _CMP_GE_OQ && how != _CMP_NLT_UQ) __builtin_trap();
  const Lanes<float> x(a), y(b);
  uint32_t mask = 0;
  for (int i = 0; i < 16; ++i) mask |= (how == _CMP_GE_OQ ? x[i] >= y[i] : !(x[i] < y[i])) << i;
  return static_cast<__mmask16>(mask);
}
// Lanes of `to` in the mask; others are those of `from`.
inline __m512 masked(__m512 from, __mmask16 mask, __m512 to) {
  return generate<__m512, float>([=, from = Lanes<float>(from), to = Lanes<float>(to)](int i) {
    return in(mask, i) ? to[i] : from[i];
  });
}
inline __m512 zero_masked(__mmask16 mask, __m512 to) { return masked(all(0.0f), mask, to); }
inline __m512 masked_add(__m512 from, __mmask16 mask, __m512 a, __m512 b) { return masked(from, mask, add(a, b)); }
inline __m512 masked_subtract(__m512 from, __mmask16 mask, __m512 a, __m512 b) {
  return masked(from, mask, subtract(a, b));
}
inline __m512 masked_maximum(__m512 from, __mmask16 mask, __m512 a, __m512 b) {
  return masked(from, mask, maximum(a, b));
}
inline float largest(__m512 v) {
  Lanes<float> x(v);
  for (int width = 8; width; width /= 2) {
    for (int i = 0; i < width; ++i) x[i] = larger(x[i], x[i + width]);
  }
  return x[0];
}
// Lanes in the mask, in front of zeros.
template <typename T, typename V>
V compressed(uint32_t mask, V v) {
  const Lanes<T> from(v);
  Lanes<T> out;
  for (int i = 0, next = 0; i < out.count; ++i) {
    if (in(mask, i)) out[next++] = from[i];
  }
  return out;
}
template <typename V, typename T>
V masked_load(uint32_t mask, const void* from) {
  Lanes<T> out;
  for (int i = 0; i < out.count; ++i) {
    if (in(mask, i)) std::memcpy(&out[i], static_cast<const char*>(from) + i * sizeof(T), sizeof(T));
  }
  return out;
}

// Integers.
inline __m512i add(__m512i a, __m512i b) { return map<uint32_t>([](uint32_t x, uint32_t y) { return x + y; }, a, b); }
inline __m512i both(__m512i a, __m512i b) { return map<uint64_t>([](uint64_t x, uint64_t y) { return x & y; }, a, b); }
inline __m512i differing(__m512i a, __m512i b) { return map<uint64_t>([](uint64_t x, uint64_t y) { return x ^ y; }, a, b); }
inline __m512i left(__m512i v, unsigned bits) { return map<uint32_t>([=](uint32_t x) { return x << bits; }, v); }
inline __m512i right16(__m512i v, unsigned bits) {
  return map<uint16_t>([=](uint16_t x) { return static_cast<uint16_t>(x >> bits); }, v);
}
inline __mmask16 tested(__m512i a, __m512i b) {
  const Lanes<uint32_t> found(both(a, b));
  uint32_t mask = 0;
  for (int i = 0; i < 16; ++i) mask |= (found[i] != 0) << i;
  return static_cast<__mmask16>(mask);
}
// Bit `4 a + 2 b + c` of the table, for each bit of the operands.
template <typename V>
V ternary(V a, V b, V c, int table) {
  const Lanes<uint64_t, sizeof(V)> x(a), y(b), z(c);
  return generate<V, uint64_t>([&](int i) {
    uint64_t out = 0;
    for (int set = 0; set < 8; ++set) {
      const uint64_t here = (set & 4 ? x[i] : ~x[i]) & (set & 2 ? y[i] : ~y[i]) & (set & 1 ? z[i] : ~z[i]);
      if (table >> set & 1) out |= here;
    }
    return out;
  });
}
template <typename V, typename T, typename From>
V widened(__m256i v) {
  return generate<V, T>([from = Lanes<From, 32>(v)](int i) { return static_cast<T>(from[i]); });
}
inline __m512 halves_widened(__m256i v) {
  return insert(resized<__m512>(_mm256_cvtph_ps(_mm256_castsi256_si128(v))),
                _mm256_cvtph_ps(_mm256_extracti128_si256(v, 1)), 1);
}
inline __m512 to_float(__m512i v) {
  return generate<__m512, float>([from = Lanes<int32_t>(v)](int i) { return static_cast<float>(from[i]); });
}

// Lanes of another place: of two registers one after the other, of 128-bit lanes, and of both by turns.
template <typename T, typename Index, typename V>
V permuted(V a, __m512i places, V b) {
  const Lanes<T> first(a), second(b);
  const Lanes<Index> place(places);
  return generate<V, T>([&](int i) {
    const int from = place[i] % (2 * first.count);
    return from < first.count ? first[from] : second[from - first.count];
  });
}
inline __m512 permuted(__m512i places, __m512 v) { return permuted<float, uint32_t>(v, places, v); }
template <typename V>
V shuffled(V a, V b, int places) {
  V out;
  for (int i = 0; i < 4; ++i) {
    std::memcpy(reinterpret_cast<char*>(&out) + 16 * i,
                reinterpret_cast<const char*>(i < 2 ? &a : &b) + 16 * (places >> 2 * i & 3), 16);
  }
  return out;
}
template <typename T, bool high>
__m512i unpacked(__m512i a, __m512i b) {
  constexpr int lanes = 16 / sizeof(T);
  return generate<__m512i, T>([first = Lanes<T>(a), second = Lanes<T>(b)](int i) {
    const int from = i / lanes * lanes + i % lanes / 2 + (high ? lanes / 2 : 0);
    return i % 2 ? second[from] : first[from];
  });
}

// Products of neighbours, added to a sum.
template <typename A, typename B>
__m512i dot(__m512i sums, __m512i a, __m512i b) {
  const Lanes<A> first(a);
  const Lanes<B> second(b);
  return generate<__m512i, uint32_t>([&, sum = Lanes<uint32_t>(sums)](int i) {
    uint32_t out = sum[i];
    for (int j = i * 4 / sizeof(A); j < (i + 1) * 4 / static_cast<int>(sizeof(A)); ++j) out += first[j] * second[j];
    return out;
  });
}
inline float of_bfloat16(uint16_t bits) {
  const uint32_t wide = static_cast<uint32_t>(bits) << 16;
  return load<float>(&wide);
}
inline uint16_t to_bfloat16(float x) {
  const auto bits = load<uint32_t>(&x);
  return static_cast<uint16_t>(std::isnan(x) ? bits >> 16 | 0x40 : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline __m512 dot(__m512 sums, __m512bh a, __m512bh b) {
  const Lanes<uint16_t> first(a), second(b);
  return generate<__m512, float>([&, sum = Lanes<float>(sums)](int i) {
    const float odd = sum[i] + of_bfloat16(first[2 * i + 1]) * of_bfloat16(second[2 * i + 1]);
    return odd + of_bfloat16(first[2 * i]) * of_bfloat16(second[2 * i]);
  });
}
inline __m512bh to_bfloat16(__m512 high, __m512 low) {
  return generate<__m512bh, uint16_t>([high = Lanes<float>(high), low = Lanes<float>(low)](int i) {
    return to_bfloat16(i < 16 ? low[i] : high[i - 16]);
  });
}

// In place of at::vec::Vectorized<float>, what the kernel asks of it.
struct Vec {
  __m512 values;
  Vec(__m512 values) : values(values) {}
  Vec(float value) : values(all(value)) {}
  operator __m512() const { return values; }
  static constexpr int size() { return 16; }
  static Vec loadu(const float* from) { return load<__m512>(from); }
  void store(float* to) const { emulated::store(to, values); }
  Vec floor() const { return map<float>([](float x) { return std::floor(x); }, values); }
  Vec round() const { return map<float>([](float x) { return std::nearbyint(x); }, values); }
  Vec tanh() const { return map<float>([](float x) { return std::tanh(x); }, values); }
  Vec abs() const { return map<float>([](float x) { return std::fabs(x); }, values); }
  friend Vec operator+(const Vec& a, const Vec& b) { return add(a.values, b.values); }
  friend Vec operator-(const Vec& a, const Vec& b) { return subtract(a.values, b.values); }
  friend Vec operator*(const Vec& a, const Vec& b) { return multiply(a.values, b.values); }
  friend Vec operator/(const Vec& a, const Vec& b) {
    return map<float>([](float x, float y) { return x / y; }, a.values, b.values);
  }
};

}  // namespace emulated

namespace at::vec {

using Emulated = emulated::Vec;
inline Emulated fmadd(const Emulated& a, const Emulated& b, const Emulated& c) { return emulated::fused(a, b, c); }
inline Emulated maximum(const Emulated& a, const Emulated& b) {
  const auto either = [](float x, float y) { return std::isnan(x) ? x : std::isnan(y) ? y : emulated::larger(x, y); };
  return emulated::map<float>(either, a.values, b.values);
}
inline Emulated clamp(const Emulated& v, const Emulated& low, const Emulated& high) {
  const auto smaller = [](float x, float y) { return y < x ? y : x; };
  return emulated::map<float>(smaller, emulated::maximum(v, low), high.values);
}

}  // namespace at::vec

// Some are macros of the compiler's where it doesn't optimise, and all of them are replaced.
#undef _knot_mask16
#undef _mm512_cmp_ps_mask
#undef _mm512_extracti64x4_epi64
#undef _mm512_insertf32x8
#undef _mm512_roundscale_ps
#undef _mm512_setr_epi32
#undef _mm512_shuffle_f32x4
#undef _mm512_shuffle_i64x2
#undef _mm512_slli_epi32
#undef _mm512_srli_epi16
#undef _mm512_ternarylogic_epi32
#undef _mm256_ternarylogic_epi32
#undef _mm_ternarylogic_epi32

#define _knot_mask16(mask) static_cast<__mmask16>(~(mask))
#define _mm512_add_epi32 emulated::add
#define _mm512_add_ps emulated::add
#define _mm512_and_si512 emulated::both
#define _mm512_broadcast_f32x4 emulated::repeated
#define _mm512_castps256_ps512 emulated::resized<__m512>
#define _mm512_castsi512_ps emulated::resized<__m512>
#define _mm512_castsi512_si256 emulated::resized<__m256i>
#define _mm512_cmp_ps_mask emulated::compared
#define _mm512_cvtepi32_ps emulated::to_float
#define _mm512_cvtepu16_epi32 emulated::widened<__m512i, uint32_t, uint16_t>
#define _mm512_cvtepu8_epi16 emulated::widened<__m512i, uint16_t, uint8_t>
#define _mm512_cvtne2ps_pbh emulated::to_bfloat16
#define _mm512_cvtph_ps emulated::halves_widened
#define _mm512_dpbf16_ps emulated::dot
#define _mm512_dpbusd_epi32 emulated::dot<uint8_t, int8_t>
#define _mm512_dpwssd_epi32 emulated::dot<int16_t, int16_t>
#define _mm512_extracti64x4_epi64 emulated::extract
#define _mm512_fmadd_ps emulated::fused
#define _mm512_fmsub_ps emulated::fused_minus
#define _mm512_insertf32x8 emulated::insert
#define _mm512_load_si512 emulated::load<__m512i>
#define _mm512_loadu_si512 emulated::load<__m512i>
#define _mm512_mask_add_ps emulated::masked_add
#define _mm512_mask_max_ps emulated::masked_maximum
#define _mm512_mask_mov_ps emulated::masked
#define _mm512_mask_sub_ps emulated::masked_subtract
#define _mm512_maskz_compress_epi32 emulated::compressed<int32_t, __m512i>
#define _mm512_maskz_compress_ps emulated::compressed<float, __m512>
#define _mm512_maskz_loadu_epi16 emulated::masked_load<__m512i, uint16_t>
#define _mm512_maskz_loadu_ps emulated::masked_load<__m512, float>
#define _mm512_maskz_mov_ps emulated::zero_masked
#define _mm512_max_ps emulated::maximum
#define _mm512_mul_ps emulated::multiply
#define _mm512_permutex2var_epi16 emulated::permuted<uint16_t, uint16_t>
#define _mm512_permutex2var_epi32 emulated::permuted<uint32_t, uint32_t>
#define _mm512_permutex2var_epi8 emulated::permuted<uint8_t, uint8_t>
#define _mm512_permutex2var_ps emulated::permuted<float, uint32_t>
#define _mm512_permutexvar_ps emulated::permuted
#define _mm512_reduce_max_ps emulated::largest
#define _mm512_roundscale_ps emulated::rounded
#define _mm512_scalef_ps emulated::scaled
#define _mm512_set1_epi32 emulated::all<int32_t>
#define _mm512_set1_epi64 emulated::all<int64_t>
#define _mm512_set1_epi8 emulated::all<int8_t>
#define _mm512_set1_ps emulated::all<float>
#define _mm512_setr_epi32 emulated::listed
#define _mm512_setzero_ps() emulated::all(0.0f)
#define _mm512_setzero_si512() emulated::all(0)
#define _mm512_shuffle_f32x4 emulated::shuffled<__m512>
#define _mm512_shuffle_i64x2 emulated::shuffled<__m512i>
#define _mm512_slli_epi32 emulated::left
#define _mm512_srli_epi16 emulated::right16
#define _mm512_store_si512 emulated::store<__m512i>
#define _mm512_storeu_ps emulated::store<__m512>
#define _mm512_storeu_si512 emulated::store<__m512i>
#define _mm512_sub_ps emulated::subtract
#define _mm512_ternarylogic_epi32 emulated::ternary<__m512i>
#define _mm256_ternarylogic_epi32 emulated::ternary<__m256i>
#define _mm_ternarylogic_epi32 emulated::ternary<__m128i>
#define _mm512_test_epi32_mask emulated::tested
#define _mm512_unpackhi_epi16 emulated::unpacked<uint16_t, true>
#define _mm512_unpackhi_epi32 emulated::unpacked<uint32_t, true>
#define _mm512_unpackhi_epi64 emulated::unpacked<uint64_t, true>
#define _mm512_unpackhi_epi8 emulated::unpacked<uint8_t, true>
#define _mm512_unpacklo_epi16 emulated::unpacked<uint16_t, false>
#define _mm512_unpacklo_epi32 emulated::unpacked<uint32_t, false>
#define _mm512_unpacklo_epi64 emulated::unpacked<uint64_t, false>
#define _mm512_unpacklo_epi8 emulated::unpacked<uint8_t, false>
#define _mm512_xor_si512 emulated::differing
#define _mm512_zextsi256_si512 emulated::resized<__m512i>
