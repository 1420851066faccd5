// What the copy of K says of scores: plane one of all keys, then both planes of those that may reach theta.
#pragma once

#include <algorithm>
#include <cmath>

#include "ahead.h"
#include "nibbles.h"
#include "screen_block.h"

namespace topt {

// Of a floor code's error in steps, and what a hard bound carries for rounding; as in attention/screen.py.
constexpr float kNoise = 0.2887f, kBoundSlack = 1.01f, kOffsetSlack = 1e-4f;

// One query vector in numbers: scores are made of integer sums over codes.
struct ScreenQuery {
  float bias;      // what a sum over codes stored as code + 8 lacks, for those that stand for code + 1/2
  float factor;    // of a sum times a row's step, in scaled logits
  float offset;    // scale q·mean
  float by_step;   // of the margin
  float by_error;  // of a hard one
  float limit;     // theta, taken back through the softcap
};

// The query vectors of a work item.
struct ScreenQueries {
  int8_t* codes;   // [M, D]
  ScreenQuery* of; // [M]
  // The same for both planes, whose codes are stored as code + 128, and for the query in 16 bits: finer than what K's 8
  // bits leave. What follows is there once for each of the rows that are taken at a time: [M up to a multiple of 4, 4].
  int16_t* fine;  // [M, D]
  int32_t* fine_bias;
  float *fine_half, *fine_factor, *offset;
  float* rotated;  // [D], scratch memory
  int count, dim;
};

// Encodes vector m of one KV head; `wide` is float32 [D], theta in scaled (and softcapped) logits.
inline void encode_query(const Problem& p, int kv_head, const float* wide, float theta, int m, const ScreenQueries& q) {
  const int dim = q.dim;
  const float *mean = p.screen.mean + kv_head * dim, *scale = p.screen.scale + kv_head * dim;
  const float normalise = 1.0f / static_cast<float>(hadamard_block(dim));
  Vec16 offset(0.0f), above(0.0f), squares(0.0f), unseen(0.0f);
  for (int d = 0; d < dim; d += kLanes) {
    const Vec16 query = load16(wide + d);
    offset = fma16(query, load16(mean + d), offset);
    store16(q.rotated + d, query * load16(scale + d) * load16(p.screen.signs + d));
  }
  rotate_vector(q.rotated, dim);
  for (int d = 0; d < dim; d += kLanes) {
    const Vec16 rotated = load16(q.rotated + d) * Vec16(normalise);
    store16(q.rotated + d, rotated);
    above = max_or_nan16(above, abs16(rotated));
    squares = fma16(rotated, rotated, squares);
  }
  // Of a query that isn't finite no score is either.
  const float length = std::sqrt(sum16(squares)), largest = max_lane16(above);
  const float whole = std::isfinite(length) ? largest : std::numeric_limits<float>::quiet_NaN();
  const bool sound = whole > 0 && std::isfinite(32767.0f / whole);
  const float step = whole / 127.0f, inverse = sound ? 127.0f / whole : 0.0f;
  const float fine_step = whole / 32767.0f, fine_inverse = sound ? 32767.0f / whole : 0.0f;
  if (!std::isfinite(whole)) std::fill_n(q.rotated, dim, 0.0f);
  int8_t* codes = q.codes + static_cast<int64_t>(m) * dim;
  int16_t* fine_codes = q.fine + static_cast<int64_t>(m) * dim;
  Vec16 sums(0.0f), fine_sums(0.0f);
  for (int d = 0; d < dim; d += kLanes) {
    const Vec16 rotated = load16(q.rotated + d);
    const auto rounded = [&](float inverse) {
      return Vec16::of([&](int i) { return (rotated[i] * Vec(inverse)).round(); });
    };
    const Vec16 code = rounded(inverse), left = rotated - code * Vec16(step);
    unseen = fma16(left, left, unseen);
    const Vec16 fine = rounded(fine_inverse);
    sums = sums + code, fine_sums = fine_sums + fine;
    alignas(64) float lanes[kLanes];
    store16(lanes, code);
    for (int i = 0; i < kLanes; ++i) codes[d + i] = static_cast<int8_t>(static_cast<int32_t>(lanes[i]));
    store16(lanes, fine);
    int16_t *low = fine_codes + fine_place(d, dim), *high = fine_codes + fine_place(d + kWordBytes, dim);
    for (int i = 0; i < kWordBytes; ++i) low[i] = static_cast<int16_t>(static_cast<int32_t>(lanes[i]));
    for (int i = 0; i < kWordBytes; ++i) high[i] = static_cast<int16_t>(static_cast<int32_t>(lanes[kWordBytes + i]));
  }
  // Sums of up to 512 integers of 16 bits: exact.
  const auto sum = static_cast<int32_t>(sum16(sums)), fine_sum = static_cast<int32_t>(sum16(fine_sums));
  ScreenQuery& of = q.of[m];
  of.bias = static_cast<float>(-8 * sum) + 0.5f * static_cast<float>(sum);
  of.factor = p.scale * step, of.offset = p.scale * sum16(offset);
  const float rest = kBoundSlack * 8.0f * std::sqrt(static_cast<float>(dim) * sum16(unseen));
  of.by_step = p.scale * (p.screen.hard ? rest : p.screen.margin * kNoise * length);
  of.by_error = p.scale * kBoundSlack * length;
  // A softcap rises with its argument, so theta is taken back through it once instead of capping every upper end.
  const float cap = p.softcap;
  of.limit = cap > 0 ? theta >= cap ? kInfinity : theta <= -cap ? -kInfinity : cap * std::atanh(theta / cap) : theta;
  for (int i = kFineRows * m; i < kFineRows * (m + 1); ++i) {
    q.fine_bias[i] = -128 * fine_sum, q.fine_half[i] = 0.5f * static_cast<float>(fine_sum);
    q.fine_factor[i] = p.scale * fine_step / 16.0f, q.offset[i] = of.offset;
  }
}

// Scores of MT vectors from `first` on for the 16 rows of a group, without softcap; returns the lanes that may reach
// theta.
template <int MT, bool hard>
TOPT_INLINE uint32_t screen_rows(const ScreenQueries& q, int first, const ScreenGroup& group, float* scores,
                            int64_t score_stride, const char* ahead) {
  RowSums sums[MT];
  dot_group<MT>(group.codes, q.codes + static_cast<int64_t>(first) * q.dim, q.dim, ahead, sums);
  const Vec16 step = load16(group.steps);
  uint32_t candidates = 0;
  TOPT_UNROLL
  for (int m = 0; m < MT; ++m) {
    const ScreenQuery& of = q.of[first + m];
    const Vec16 sum = to_float(sums[m]) + Vec16(of.bias);
    const Vec16 score = fma16(step, sum * Vec16(of.factor), Vec16(of.offset));
    Vec16 upper = fma16(step, Vec16(of.by_step), score);
    if constexpr (hard) {
      upper = fma16(load16(group.errors), Vec16(of.by_error), upper);
      upper = fma16(abs16(score), Vec16(kOffsetSlack), upper);
    }
    candidates |= not_below16(upper, of.limit);
    store16(scores + (first + m) * score_stride, score);
  }
  return candidates;
}

// A group's approximate scores, [M, 16], for all vectors; returns its candidates. `ahead` is a group to ask for, or null.
template <bool hard>
TOPT_INLINE uint32_t screen_group(const ScreenQueries& q, const ScreenGroup& group, float softcap, float* scores,
                             int64_t score_stride, const char* ahead) {
  uint32_t candidates = 0;
  if (ahead) ask(ahead + 8 * q.dim);
  in_register_tiles<4>(q.count, [&](auto vectors, int m) {
    candidates |= screen_rows<vectors(), hard>(q, m, group, scores, score_stride, m ? nullptr : ahead);
  });
  for (int m = 0; m < q.count && softcap > 0; ++m) {
    float* score = scores + m * score_stride;
    store16(score, softcap16(load16(score), softcap));
  }
  return candidates;
}

// Scores by both planes of `count` rows of a block that begins at `start`, whose positions are listed, without softcap:
// [M, count up to a multiple of 4].
TOPT_INLINE void refine_rows(const ScreenQueries& q, const ScreenBlock& block, int start, const int32_t* listed,
                             int count, float* scores, int64_t score_stride) {
  for (int i = 0; i < count; i += kFineRows) {
    FineRows rows;
    const c10::Half* steps[kFineRows];
    TOPT_UNROLL
    for (int j = 0; j < kFineRows; ++j) {
      const auto row = static_cast<uint32_t>(listed[std::min(i + j, count - 1)] - start), lane = row % kLanes;
      const ScreenGroup group = block.group(row / kLanes);
      rows.one[j] = group.codes + lane * kWordBytes, rows.two[j] = block.plane_two(row);
      steps[j] = group.steps + lane;
    }
    const Vec16 step = repeated16(steps);
    alignas(64) float fine[kLanes];
    in_register_tiles<4>(q.count, [&](auto vectors, int m) {
      const RowSums sums = dot_rows<vectors()>(rows, q.fine + static_cast<int64_t>(m) * q.dim, q.dim);
      const int at = kFineRows * m;
      const Vec16 sum = to_float(plus(sums, q.fine_bias + at)) + load16(q.fine_half + at);
      store16(fine, sum * load16(q.fine_factor + at) * step + load16(q.offset + at));
      for (int v = 0; v < vectors(); ++v) {
        std::memcpy(scores + (m + v) * score_stride + i, fine + kFineRows * v, kFineRows * sizeof(float));
      }
    });
  }
}

}  // namespace topt
