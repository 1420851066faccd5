// Writes the copy of K, 16 rows of one KV head at a time: K [D, P] has 16 tokens side by side, so each lane is a row and
// nothing is shuffled. Every operation is single and in the order of attention/screen.py, whose bits it gives.
#pragma once

#include <bit>

#include "bytes.h"
#include "screen_block.h"

namespace topt {

// The least float16 not below x >= 0; NaN of NaN.
inline c10::Half round_up(float x) {
  c10::Half rounded(x);
  if (static_cast<float>(rounded) < x) ++rounded.x;
  return rounded;
}

// What error norms carry beyond their own rounding.
constexpr float kErrorSlack = 1.01f;

// Integers from -128 to 127 of 16 lanes, those of a word's channels, as its two words; `words` [4, 16] has the lower and
// upper half of plane one, then of plane two.
inline void pack_word(const float* codes, uint32_t (*words)[kLanes]) {
  for (int half = 0; half < 2; ++half) {
    const float *low = codes + 4 * half * kLanes, *high = low + 8 * kLanes;
    for (int lane = 0; lane < kLanes; ++lane) {
      uint32_t lower = 0, upper = 0;
      for (int i = 0; i < 4; ++i) {
        lower |= static_cast<uint32_t>(static_cast<int32_t>(low[i * kLanes + lane]) + 128) << 8 * i;
        upper |= static_cast<uint32_t>(static_cast<int32_t>(high[i * kLanes + lane]) + 128) << 8 * i;
      }
      words[half][lane] = (lower >> 4 & 0x0f0f0f0fu) | (upper & 0xf0f0f0f0u);
      words[2 + half][lane] = (lower & 0x0f0f0f0fu) | (upper << 4 & 0xf0f0f0f0u);
    }
  }
}

// Encodes rows [begin, end) of the 16 of a group. `z` [D, 16] is scratch memory.
template <typename T>
void encode_group(const Problem& p, const T* key, int kv_head, const ScreenBlock& block, int index, int begin, int end,
                  float* z) {
  const float *mean = p.screen.mean + kv_head * p.head_dim, *factor = p.screen.factor + kv_head * p.head_dim;
  for (int d = 0; d < p.head_dim; ++d) {
    const Vec16 k = load16(key + d * p.key_dim_stride) * Vec16(p.key_scale);
    store16(z + d * kLanes, (k - Vec16(mean[d])) * Vec16(factor[d]));
  }
  rotate_rows(z, p.head_dim);

  const ScreenGroup group = block.group(index);
  alignas(64) float largest[kLanes], step[kLanes], inverse[kLanes], norm[kLanes];
  c10::Half steps[kLanes];
  Vec16 above(0.0f);
  for (int d = 0; d < p.head_dim; ++d) above = max_or_nan16(above, abs16(load16(z + d * kLanes)));
  store16(largest, above);
  uint32_t sound = 0;  // lanes whose step is a number above 0
  for (int lane = 0; lane < kLanes; ++lane) {
    steps[lane] = round_up(largest[lane] / 8.0f);
    step[lane] = static_cast<float>(steps[lane]);
    if (!std::isfinite(step[lane])) {
      step[lane] = std::numeric_limits<float>::quiet_NaN();
      steps[lane] = c10::Half(step[lane]);
    }
    sound |= static_cast<uint32_t>(step[lane] > 0) << lane;
    inverse[lane] = step[lane] > 0 ? 16.0f / step[lane] : 0.0f;
  }

  const Vec16 wide = load16(step), inverses = load16(inverse);
  Vec16 squares(0.0f);
  for (int word = 0; word < p.head_dim / kWordChannels; ++word) {
    alignas(64) float codes[kWordChannels * kLanes];
    alignas(64) uint32_t words[4][kLanes];
    for (int i = 0; i < kWordChannels; ++i) {
      const Vec16 value = load16(z + (word * kWordChannels + i) * kLanes);
      const Vec16 code = select16(Vec16::of([&](int part) {
        const Vec floor = (value[part] * inverses[part]).floor();
        return at::vec::clamp(floor, Vec(-128.0f), Vec(127.0f));
      }), sound, 0.0f);
      store16(codes + i * kLanes, code);
      const Vec16 plane = Vec16::of([&](int part) { return (code[part] * Vec(0.0625f)).floor(); });
      const Vec16 left = value - (plane + Vec16(0.5f)) * wide;
      squares = fma16(left, left, squares);
    }
    pack_word(codes, words);
    for (int lane = begin; lane < end; ++lane) {
      uint8_t* one = group.codes + (word * kLanes + lane) * kWordBytes;
      uint8_t* two = block.plane_two(index * kLanes + lane) + word * kWordBytes;
      for (int half = 0; half < 2; ++half) {
        std::memcpy(one + 4 * half, &words[half][lane], 4);
        std::memcpy(two + 4 * half, &words[2 + half][lane], 4);
      }
    }
  }
  store16(norm, squares);
  for (int lane = begin; lane < end; ++lane) {
    group.steps[lane] = steps[lane];
    group.errors[lane] = round_up(kErrorSlack * std::sqrt(norm[lane]));
  }
}

// Encodes what is written of 16 rows of a sequence, those from 16 `index` on: [begin, end) bounds all that is written.
template <typename T>
void write_codes(const Problem& p, int sequence, int kv_head, int index, int begin, int end, float* z) {
  const int first = index * kLanes, block = first / p.block_size, row = first % p.block_size;
  const int64_t physical = p.block_table[sequence * p.block_table_stride + block];
  const T* key = static_cast<const T*>(p.key) + physical * p.key_block_stride + kv_head * p.key_head_stride + row;
  encode_group(p, key, kv_head, screen_block(p, sequence, kv_head, block), row / kLanes, std::max(0, begin - first),
               std::min(kLanes, end - first), z);
}

}  // namespace topt
