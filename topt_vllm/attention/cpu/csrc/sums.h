// Running sums of V: state t of a block holds the sum of all V rows of the context up to the last of the state's rows.
#pragma once

#include "bytes.h"
#include "problem.h"
#include "vector.h"

namespace topt {

// The state that ends before row `end`, a multiple of state_rows above 0.
inline float* state_before(const Problem& p, int sequence, int kv_head, int end) {
  const int last = end - 1;
  const int64_t block = p.block_table[sequence * p.block_table_stride + last / p.block_size];
  return p.value_sums + block * p.sums_block_stride + kv_head * p.sums_head_stride +
         last % p.block_size / p.state_rows * p.sums_state_stride;
}

// V row of a position of a sequence; those of the rows behind it in its block follow.
template <typename T>
const T* value_row(const Problem& p, int sequence, int kv_head, int position) {
  const int64_t block = p.block_table[sequence * p.block_table_stride + position / p.block_size];
  return static_cast<const T*>(p.value) + block * p.value_block_stride + kv_head * p.value_head_stride +
         position % p.block_size * p.value_token_stride;
}

// 16 components, from `dim` on, of the sum of `count` rows of one block, one after the other.
template <typename T>
Vec16 sum_rows(const Problem& p, const T* row, int count, int dim) {
  Vec16 sum(0.0f);
  for (int i = 0; i < count; ++i, row += p.value_token_stride) sum = sum + load16(row + dim);
  return sum;
}

// Sum of the V rows of a context of n rows, [D].
template <typename T>
void sum_context(const Problem& p, int sequence, int kv_head, int n, float* sums) {
  const int first = sums_end(p, n);
  const T* tail = value_row<T>(p, sequence, kv_head, first);
  const float* state = first > 0 ? state_before(p, sequence, kv_head, first) : nullptr;
  for (int d = 0; d < p.head_dim; d += kLanes) {
    const Vec16 sum = sum_rows(p, tail, n - first, d);
    store16(sums + d, state ? load16(state + d) + sum : sum);
  }
}

// Writes the states that end in rows [begin, end) of a sequence, in order: each is the one before it and the sum of its
// own rows, so that its bits don't depend on how the rows came.
template <typename T>
void write_states(const Problem& p, int sequence, int kv_head, int begin, int end) {
  for (int last = (begin / p.state_rows + 1) * p.state_rows; last <= end; last += p.state_rows) {
    const int first = last - p.state_rows;
    const T* rows = value_row<T>(p, sequence, kv_head, first);
    const float* before = first > 0 ? state_before(p, sequence, kv_head, first) : nullptr;
    float* state = state_before(p, sequence, kv_head, last);
    for (int d = 0; d < p.head_dim; d += kLanes) {
      const Vec16 sum = sum_rows(p, rows, p.state_rows, d);
      store16(state + d, before ? load16(before + d) + sum : sum);
    }
  }
}

}  // namespace topt
