// The copy of K in two planes of 4 bits: where its parts lie, and the rotation that its rows share with queries.
#pragma once

#include <cstring>

#include "problem.h"
#include "vector.h"

namespace topt {

// Channels that one word of 8 bytes holds: byte i has channel i below and channel i + 8 above.
constexpr int kWordChannels = 16;
constexpr int kWordBytes = 8;

// One block of one KV head, contiguous: P / 16 groups, then plane two.
//   group      uint8 [D / 16, 16 rows, 8]  plane one, a word of each row in turns: floor code + 8
//              float16 [16]                steps
//              float16 [16]                error norms
//   plane two  uint8 [P, D / 16, 8]        the lower four bits of the 8-bit codes
// All of plane one that a query needs is one stream; plane two of a row is a line or two.
struct ScreenGroup {
  uint8_t* codes;
  c10::Half *steps, *errors;
};

struct ScreenBlock {
  char* memory;
  int head_dim, block_size;

  static int64_t bytes(int head_dim, int block_size) { return static_cast<int64_t>(block_size) * (head_dim + 4); }
  static int64_t group_bytes(int head_dim) { return 8 * head_dim + 4 * kLanes; }

  ScreenGroup group(int index) const {
    auto* codes = reinterpret_cast<uint8_t*>(memory + index * group_bytes(head_dim));
    auto* steps = reinterpret_cast<c10::Half*>(codes + 8 * head_dim);
    return {codes, steps, steps + kLanes};
  }
  uint8_t* plane_two(int row) const {
    return reinterpret_cast<uint8_t*>(memory + block_size / kLanes * group_bytes(head_dim) + row * (head_dim / 2));
  }
};

inline ScreenBlock screen_block(const Problem& p, int sequence, int kv_head, int block) {
  const int64_t physical = p.block_table[sequence * p.block_table_stride + block];
  char* memory = p.screen.codes + physical * p.screen.block_stride;
  return {memory + kv_head * ScreenBlock::bytes(p.head_dim, p.block_size), p.head_dim, p.block_size};
}

// Channels that are rotated together: the largest power of two that divides the head dimension.
inline int hadamard_block(int head_dim) { return head_dim & -head_dim; }

inline void butterfly(Vec16& low, Vec16& high) {
  const Vec16 sum = low + high;
  high = low - high;
  low = sum;
}

// Butterflies over neighbours at the distances from `distance` on, of D times 16 floats side by side; `block` and
// `distance` count those. Two distances at a time, which halves the loads and stores.
inline void rotate_from(float* z, int count, int block, int distance) {
  for (; 2 * distance < block; distance *= 4) {
    for (int first = 0; first < count; first += 4 * distance) {
      for (int i = first; i < first + distance; ++i) {
        float* at[4];
        Vec16 v[4];
        for (int j = 0; j < 4; ++j) v[j] = load16(at[j] = z + (i + j * distance) * kLanes);
        butterfly(v[0], v[1]), butterfly(v[2], v[3]);
        butterfly(v[0], v[2]), butterfly(v[1], v[3]);
        for (int j = 0; j < 4; ++j) store16(at[j], v[j]);
      }
    }
  }
  for (int first = 0; first < count && distance < block; first += 2 * distance) {
    for (int i = first; i < first + distance; ++i) {
      float *at = z + i * kLanes, *other = at + distance * kLanes;
      Vec16 low = load16(at), high = load16(other);
      butterfly(low, high);
      store16(at, low), store16(other, high);
    }
  }
}

// Rotates 16 rows at once, one in each lane: z [D, 16].
inline void rotate_rows(float* z, int head_dim) { rotate_from(z, head_dim, hadamard_block(head_dim), 1); }

// Rotates one vector, x [D].
inline void rotate_vector(float* x, int head_dim) {
  for (int d = 0; d < head_dim; d += kLanes) {
    Vec16 v = load16(x + d);
    v = butterflies16<1>(v), v = butterflies16<2>(v), v = butterflies16<4>(v), v = butterflies16<8>(v);
    store16(x + d, v);
  }
  rotate_from(x, head_dim / kLanes, hadamard_block(head_dim) / kLanes, 1);
}

// Larger of the two; NaN where either is.
inline Vec16 max_or_nan16(const Vec16& a, const Vec16& b) {
  return Vec16::of([&](int i) { return at::vec::maximum(a[i], b[i]); });
}

inline Vec16 abs16(const Vec16& v) {
  return Vec16::of([&](int i) { return v[i].abs(); });
}

}  // namespace topt
