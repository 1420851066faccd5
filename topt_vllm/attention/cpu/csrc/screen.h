// The screen: an 8-bit copy of finished blocks of K. Its scores come with a hard error bound, so keys whose score
// plus bound stays below theta are dropped without reading their K; README.md derives the bound.
#pragma once

#include <algorithm>
#include <cmath>

#include "ahead.h"
#include "problem.h"
#include "vector.h"

namespace topt {

// Tokens that share a cache line of K in each channel: what one candidate makes the kernel read in full.
constexpr int kLineTokens = 32;
// Blocks between the one that is screened and the one whose codes are asked for.
constexpr int kScreenAhead = 2;
// Covers the float32 rounding of both scores: D 2^-24 against 2^-8 of the bound, and as much again.
constexpr float kBoundSlack = 1.01f;

// Channels that share a scale: 64 where they divide the head, else the whole head.
inline int scale_channels(int head_dim) { return head_dim % 64 == 0 ? 64 : head_dim; }

// One block of one KV head, contiguous:
//   codes  uint8 [D / 4, P, 4]  round(k / scale) + 128: four channels of a token side by side, as vpdpbusd wants
//   scales bfloat16 [D / S, P]  per token and S channels
//   norms  bfloat16 [P]         sum over channels of |scale (code - 128)|, rounded up
struct ScreenBlock {
  uint8_t* codes;
  c10::BFloat16 *scales, *norms;

  static int64_t bytes(int head_dim, int block_size) {
    return static_cast<int64_t>(block_size) * (head_dim + 2 * (head_dim / scale_channels(head_dim) + 1));
  }
  ScreenBlock(void* memory, int head_dim, int block_size) {
    codes = static_cast<uint8_t*>(memory);
    scales = reinterpret_cast<c10::BFloat16*>(codes + static_cast<int64_t>(head_dim) * block_size);
    norms = scales + static_cast<int64_t>(head_dim / scale_channels(head_dim)) * block_size;
  }
};

// Smallest bfloat16 that is not below a non-negative x.
inline c10::BFloat16 round_up(float x) {
  c10::BFloat16 rounded(x);
  if (static_cast<float>(rounded) < x) ++rounded.x;
  return rounded;
}

// Fills the screen of one block from K [D, P]. A token with a NaN or an infinity gets an infinite scale, so that
// its bound is never below theta and its K is read.
template <typename T>
void encode_block(const T* key, int64_t dim_stride, int head_dim, int block_size, ScreenBlock out) {
  const int width = scale_channels(head_dim);
  for (int token = 0; token < block_size; ++token) {
    float norm = 0;
    for (int first = 0; first < head_dim; first += width) {
      float largest = 0, finite = 0;
      for (int d = first; d < first + width; ++d) {
        const float k = static_cast<float>(key[d * dim_stride + token]);
        largest = std::max(largest, std::abs(k));
        finite += k * 0.0f;
      }
      const c10::BFloat16 scale = finite == 0 ? round_up(largest / 127.0f) : c10::BFloat16(kInfinity);
      out.scales[first / width * block_size + token] = scale;
      const float inverse = finite == 0 && largest > 0 ? 1.0f / static_cast<float>(scale) : 0.0f;
      for (int d = first; d < first + width; ++d) {
        const float code = inverse > 0 ? std::nearbyint(static_cast<float>(key[d * dim_stride + token]) * inverse) : 0.0f;
        norm += std::abs(code) * static_cast<float>(scale);
        out.codes[(static_cast<int64_t>(d / 4) * block_size + token) * 4 + d % 4] = static_cast<uint8_t>(code + 128.0f);
      }
    }
    out.norms[token] = std::isfinite(norm) ? round_up(norm) : c10::BFloat16(kInfinity);
  }
}

// 8-bit query vectors of a work item. k = scale (code - 128) + e_k and q = step q8 + e_q with |e_k| <= scale / 2 and
// |e_q| <= step / 2, so |q·k - scale step q8·(code - 128)| <= scale / 2 |q|_1 + step / 2 |scale (code - 128)|_1.
struct ScreenQueries {
  int8_t* codes;   // [M, D]
  float* half_l1;  // [M, D / S], |q|_1 / 2 of the channels that share a scale
  int32_t* offset; // [M, D / S], -128 sum of their codes
  float* step;     // [M]
  float* limit;    // [M], q·k below which a key is dropped
  int count, dim;

  int groups() const { return dim / scale_channels(dim); }
};

// Encodes vector m from float32 [D]; `theta` is in scaled (and softcapped) logits.
inline void encode_query(const ScreenQueries& q, int m, const float* wide, float theta, float scale, float softcap) {
  const int width = scale_channels(q.dim), groups = q.groups();
  float largest = 0;
  for (int d = 0; d < q.dim; ++d) largest = std::max(largest, std::abs(wide[d]));
  const float step = largest / 127.0f, inverse = largest > 0 ? 127.0f / largest : 0.0f;
  q.step[m] = step;
  for (int g = 0; g < groups; ++g) {
    float l1 = 0;
    int sum = 0;
    for (int d = g * width; d < (g + 1) * width; ++d) {
      const int code = static_cast<int>(std::nearbyint(wide[d] * inverse));
      q.codes[m * q.dim + d] = static_cast<int8_t>(code);
      sum += code;
      l1 += std::abs(wide[d]);
    }
    q.half_l1[m * groups + g] = 0.5f * kBoundSlack * l1;
    q.offset[m * groups + g] = -128 * sum;
  }
  // Softcap rises with its argument, so theta is taken back through it once instead of capping every score.
  float limit = theta;
  if (softcap > 0) limit = theta >= softcap ? kInfinity : theta <= -softcap ? -kInfinity : softcap * std::atanh(theta / softcap);
  limit /= scale;
  q.limit[m] = std::isfinite(limit) ? limit - 1e-4f * std::abs(limit) : limit;
}

#if TOPT_AVX512 && defined(__AVX512VNNI__)

inline void dot4(__m512i& sum, const uint8_t* keys, const int8_t* query) {
  int four;
  __builtin_memcpy(&four, query, sizeof(four));
  sum = _mm512_dpbusd_epi32(sum, _mm512_loadu_si512(keys), _mm512_set1_epi32(four));
}

inline Vec16 to_float(const __m512i& sum) { return Vec16(Vec(_mm512_cvtepi32_ps(sum))); }
inline __m512i broadcast(int32_t value) { return _mm512_set1_epi32(value); }
using Int16 = __m512i;

#else

struct Int16 {
  int32_t lane[kLanes];
};

inline void dot4(Int16& sum, const uint8_t* keys, const int8_t* query) {
  for (int t = 0; t < kLanes; ++t) {
    for (int c = 0; c < 4; ++c) sum.lane[t] += static_cast<int32_t>(keys[4 * t + c]) * query[c];
  }
}

inline Vec16 to_float(const Int16& sum) {
  alignas(64) float lanes[kLanes];
  for (int t = 0; t < kLanes; ++t) lanes[t] = static_cast<float>(sum.lane[t]);
  return load16(lanes);
}
inline Int16 broadcast(int32_t value) {
  Int16 out;
  for (int32_t& lane : out.lane) lane = value;
  return out;
}

#endif

// Scores of MT vectors from `first` on for 16 C tokens from `token` on: writes the approximate q·k, and ORs into
// candidates[c] the lanes whose true score may reach their vector's limit.
template <int MT, int C>
inline void screen_tile(const ScreenQueries& q, int first, const ScreenBlock& block, int block_size, int token,
                        float* scores, int64_t score_stride, uint32_t* candidates, const uint8_t* ahead) {
  const int width = scale_channels(q.dim), groups = q.groups();
  float* out = scores + first * score_stride + token;
  for (int g = 0; g < groups; ++g) {
    Int16 sum[MT][C];
    TOPT_UNROLL
    for (int m = 0; m < MT; ++m) {
    TOPT_UNROLL
      for (int c = 0; c < C; ++c) sum[m][c] = broadcast(q.offset[(first + m) * groups + g]);
    }
    for (int d = g * width; d < (g + 1) * width; d += 4) {
      const uint8_t* keys = block.codes + (static_cast<int64_t>(d / 4) * block_size + token) * 4;
    TOPT_UNROLL
      for (int m = 0; m < MT; ++m) {
    TOPT_UNROLL
        for (int c = 0; c < C; ++c) dot4(sum[m][c], keys + 64 * c, q.codes + (first + m) * q.dim + d);
      }
      if (ahead) {
    TOPT_UNROLL
        for (int c = 0; c < C; ++c) ask(ahead + (keys - block.codes) + 64 * c);
      }
    }
    TOPT_UNROLL
    for (int c = 0; c < C; ++c) {
      const Vec16 scale = load16(block.scales + g * block_size + token + c * kLanes);
    TOPT_UNROLL
      for (int m = 0; m < MT; ++m) {
        float* target = out + m * score_stride + c * kLanes;
        const Vec16 part = to_float(sum[m][c]) * scale;
        store16(target, g ? load16(target) + part : part);
      }
    }
  }
    TOPT_UNROLL
  for (int c = 0; c < C; ++c) {
    const Vec16 norm = load16(block.norms + token + c * kLanes);
    TOPT_UNROLL
    for (int m = 0; m < MT; ++m) {
      float* target = out + m * score_stride + c * kLanes;
      const Vec16 score = load16(target) * Vec16(q.step[first + m]);
      Vec16 upper = fma16(norm, Vec16(0.5f * kBoundSlack * q.step[first + m]), score);
      for (int g = 0; g < groups; ++g) {
        const Vec16 scale = load16(block.scales + g * block_size + token + c * kLanes);
        upper = fma16(Vec16(q.half_l1[(first + m) * groups + g]), scale, upper);
      }
      store16(target, score);
      candidates[c] |= not_below16(upper, q.limit[first + m]);
    }
  }
}

template <int MT>
inline void screen_vectors(const ScreenQueries& q, int first, const ScreenBlock& block, int block_size, float* scores,
                           int64_t score_stride, uint32_t* candidates, const uint8_t* ahead) {
  int t = 0;
  for (; t + kTileColumns * kLanes <= block_size; t += kTileColumns * kLanes) {
    screen_tile<MT, kTileColumns>(q, first, block, block_size, t, scores, score_stride, candidates + t / kLanes, ahead);
  }
  for (; t < block_size; t += kLanes) {
    screen_tile<MT, 1>(q, first, block, block_size, t, scores, score_stride, candidates + t / kLanes, ahead);
  }
}

// A finished block: approximate scores [M, P] and the candidates of its 16-token words, which must be clear.
// `ahead` are codes to ask for, line by line as those of this block are read, or null.
inline void screen_block(const ScreenQueries& q, const ScreenBlock& block, int block_size, float* scores,
                         int64_t score_stride, uint32_t* candidates, const uint8_t* ahead) {
  in_register_tiles(q.count, [&](auto vectors, int m) {
    screen_vectors<vectors()>(q, m, block, block_size, scores, score_stride, candidates, m ? nullptr : ahead);
  });
}

}  // namespace topt
