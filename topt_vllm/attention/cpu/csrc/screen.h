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
  int32_t bias;         // what codes stored as code + 8 add to a sum
  float half;           // for code + 1/2
  float factor;         // of a sum times a row's step, in scaled logits
  float offset;         // scale q·mean
  float by_step;        // of the margin
  float by_error;       // of a hard one
  float limit;          // theta, taken back through the softcap
  int32_t fine_bias;    // the same of both planes' codes, stored as code + 128, and of the query in 16 bits
  float fine_half, fine_factor;
};

// The query vectors of a work item.
struct ScreenQueries {
  int8_t* codes;   // [M, D]
  int16_t* fine;   // [M, D], the query in 16 bits: finer than what K's 8 bits leave
  ScreenQuery* of; // [M]
  float* lanes;    // [D, 16], scratch memory
  int count, dim;
};

// Encodes up to 16 vectors of one KV head from `first` on; `wide` is float32 [M, D], `rules` [M] have theta.
inline void encode_queries(const Problem& p, int kv_head, const float* wide, const KeepRule* rules, int first,
                           const ScreenQueries& q) {
  const int dim = q.dim, count = std::min(kLanes, q.count - first);
  const float *mean = p.screen.mean + kv_head * dim, *scale = p.screen.scale + kv_head * dim;
  const Vec16 normalise(1.0f / static_cast<float>(hadamard_block(dim)));
  Vec16 offset(0.0f), squares(0.0f), unseen(0.0f);
  for (int d = 0; d < dim; ++d) {
    float* lane = q.lanes + d * kLanes;
    for (int m = 0; m < kLanes; ++m) lane[m] = m < count ? wide[(first + m) * dim + d] : 0.0f;
    offset = fma16(load16(lane), Vec16(mean[d]), offset);
    store16(lane, load16(lane) * Vec16(scale[d]) * Vec16(p.screen.signs[d]));
  }
  rotate(q.lanes, dim);
  alignas(64) float largest[kLanes], inverse[kLanes], fine_inverse[kLanes], step[kLanes], fine_step[kLanes];
  store16(largest, largest16(q.lanes, dim) * normalise);
  for (int m = 0; m < kLanes; ++m) {
    // Of what isn't finite no score is either.
    const bool sound = std::isfinite(largest[m]) && largest[m] > 0;
    const float whole = std::isfinite(largest[m]) ? largest[m] : std::numeric_limits<float>::quiet_NaN();
    inverse[m] = sound ? 127.0f / largest[m] : 0.0f, fine_inverse[m] = sound ? 32767.0f / largest[m] : 0.0f;
    step[m] = whole / 127.0f, fine_step[m] = whole / 32767.0f;
    if (!std::isfinite(inverse[m])) inverse[m] = fine_inverse[m] = 0.0f;
  }
  int32_t sum[kLanes] = {}, fine_sum[kLanes] = {};
  for (int d = 0; d < dim; ++d) {
    const Vec16 rotated = load16(q.lanes + d * kLanes) * normalise;
    const auto rounded = [&](const float* inverses) {
      return Vec16::of([&](int i) { return (rotated[i] * load16(inverses)[i]).round(); });
    };
    const Vec16 code = rounded(inverse), fine = rounded(fine_inverse);
    squares = fma16(rotated, rotated, squares);
    const Vec16 left = rotated - code * load16(step);
    unseen = fma16(left, left, unseen);
    alignas(64) float codes[kLanes], fines[kLanes];
    store16(codes, code), store16(fines, fine);
    for (int m = 0; m < count; ++m) {
      const int code8 = inverse[m] > 0 ? static_cast<int>(codes[m]) : 0;
      const int code16 = inverse[m] > 0 ? static_cast<int>(fines[m]) : 0;
      q.codes[(first + m) * dim + d] = static_cast<int8_t>(code8);
      q.fine[(first + m) * dim + d] = static_cast<int16_t>(code16);
      sum[m] += code8, fine_sum[m] += code16;
    }
  }
  alignas(64) float norm[kLanes], rest[kLanes], offsets[kLanes];
  store16(norm, squares), store16(rest, unseen), store16(offsets, offset);
  for (int m = 0; m < count; ++m) {
    ScreenQuery& of = q.of[first + m];
    of.bias = -8 * sum[m], of.half = 0.5f * static_cast<float>(sum[m]);
    of.factor = p.scale * step[m], of.offset = p.scale * offsets[m];
    of.fine_bias = -128 * fine_sum[m], of.fine_half = 0.5f * static_cast<float>(fine_sum[m]);
    of.fine_factor = p.scale * fine_step[m] / 16.0f;
    const float length = std::sqrt(norm[m]);
    of.by_step = p.scale * (p.screen.hard ? kBoundSlack * 8.0f * std::sqrt(static_cast<float>(dim) * rest[m])
                                          : p.screen.margin * kNoise * length);
    of.by_error = p.scale * kBoundSlack * length;
    // A softcap rises with its argument, so theta is taken back through it once instead of capping every upper end.
    const float theta = rules[first + m].theta, cap = p.softcap;
    of.limit = cap > 0 ? theta >= cap ? kInfinity : theta <= -cap ? -kInfinity : cap * std::atanh(theta / cap) : theta;
  }
}

// Scores of MT vectors from `first` on for the 16 rows of a group; returns the lanes that may reach theta.
template <int MT>
inline uint32_t screen_rows(const ScreenQueries& q, int first, const ScreenGroup& group, bool hard, float softcap,
                            float* scores, int64_t score_stride, const char* ahead) {
  RowSums sums[MT];
  dot_group<MT>(group.codes, q.codes + static_cast<int64_t>(first) * q.dim, q.dim, ahead, sums);
  const Vec16 step = load16(group.steps);
  uint32_t candidates = 0;
  TOPT_UNROLL
  for (int m = 0; m < MT; ++m) {
    const ScreenQuery& of = q.of[first + m];
    const Vec16 sum = to_float(sums[m]) + Vec16(static_cast<float>(of.bias) + of.half);
    const Vec16 score = fma16(step, sum * Vec16(of.factor), Vec16(of.offset));
    Vec16 upper = fma16(step, Vec16(of.by_step), score);
    if (hard) {
      upper = fma16(load16(group.errors), Vec16(of.by_error), upper);
      upper = fma16(abs16(score), Vec16(kOffsetSlack), upper);
    }
    candidates |= not_below16(upper, of.limit);
    store16(scores + (first + m) * score_stride, softcap > 0 ? softcap16(score, softcap) : score);
  }
  return candidates;
}

// A group's approximate scores, [M, 16], for all vectors; returns its candidates. `ahead` is a group to ask for, or null.
inline uint32_t screen_group(const ScreenQueries& q, const ScreenGroup& group, bool hard, float softcap, float* scores,
                             int64_t score_stride, const char* ahead) {
  uint32_t candidates = 0;
  if (ahead) ask(ahead + 8 * q.dim);
  in_register_tiles<4>(q.count, [&](auto vectors, int m) {
    candidates |= screen_rows<vectors()>(q, m, group, hard, softcap, scores, score_stride, m ? nullptr : ahead);
  });
  return candidates;
}

// The scores of one row of a group by both planes, in place of the approximate ones; `scores` is [M], strided.
inline void refine_row(const ScreenQueries& q, const ScreenGroup& group, int row, const uint8_t* plane_two,
                       float softcap, float* scores, int64_t score_stride) {
  const float step = group.steps[row];
  in_register_tiles<4>(q.count, [&](auto vectors, int first) {
    int32_t sums[4];
    dot_row<vectors()>(group.codes + row * kWordBytes, plane_two, q.fine + static_cast<int64_t>(first) * q.dim, q.dim,
                       sums);
    for (int m = 0; m < vectors(); ++m) {
      const ScreenQuery& of = q.of[first + m];
      const auto sum = static_cast<int32_t>(static_cast<uint32_t>(sums[m]) + static_cast<uint32_t>(of.fine_bias));
      const float score = step * ((static_cast<float>(sum) + of.fine_half) * of.fine_factor) + of.offset;
      scores[(first + m) * score_stride] = softcap > 0 ? softcap * std::tanh(score / softcap) : score;
    }
  });
}

}  // namespace topt
