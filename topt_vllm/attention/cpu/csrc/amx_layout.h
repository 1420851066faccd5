// The layout of vLLM's AMX kernels (csrc/cpu/cpu_attn_amx.hpp, 0.31 to 0.33), of elements of 16 bits or 8.
#pragma once

#include "problem.h"

namespace topt {

// Two rows side by side, element by element, 16 columns at a time: [columns / 16, rows / 2, 16, 2].
//   source  [rows, columns], rows `stride` elements apart
template <typename T>
void pair_rows(const T* source, int64_t stride, int rows, int columns, T* target) {
  constexpr int lanes = 16;
  for (int column = 0; column < columns; column += lanes) {
    for (int row = 0; row < rows; row += 2, target += 2 * lanes) {
      const T *first = source + row * stride + column, *second = first + stride;
      for (int i = 0; i < lanes; ++i) target[2 * i] = first[i], target[2 * i + 1] = second[i];
    }
  }
}

// One block of one KV head, K [D, P] and V [P, D]: pairs of channels of 16 tokens, then pairs of tokens of 16 channels.
template <typename T>
void copy_to_amx(const Problem& p, int64_t block, int kv_head, T* target) {
  const T* key = static_cast<const T*>(p.key) + block * p.key_block_stride + kv_head * p.key_head_stride;
  const T* value = static_cast<const T*>(p.value) + block * p.value_block_stride + kv_head * p.value_head_stride;
  pair_rows(key, p.key_dim_stride, p.head_dim, p.block_size, target);
  pair_rows(value, p.value_token_stride, p.block_size, p.head_dim, target + p.head_dim * p.block_size);
}

}  // namespace topt
