// Running sums of V: state t of a block holds the sum of all V rows of the context up to the last of the state's rows.
#pragma once

#include <algorithm>
#include <vector>

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

// The first state that has to be summed so that state `first` of a sequence can be written. An earlier one where the
// states before are being written from this batch too: a sequence may find blocks in the prefix cache that another
// fills in the same step.
inline int first_to_sum(const Problem& p, int sequence, int first) {
  for (int start = first;;) {
    const int last = start * p.state_rows - 1;
    const auto block_of = [&](int s) { return p.block_table[s * p.block_table_stride + last / p.block_size]; };
    for (int other = 0; other < p.num_sequences && last >= 0; ++other) {
      const int begin = first_written(p, other);
      if (other == sequence || begin > last || last >= p.seq_lens[other]) continue;
      if (block_of(other) == block_of(sequence)) start = std::min(start, begin / p.state_rows);
    }
    if (last < 0 || start * p.state_rows > last) return start;
  }
}

// Writes the states that end in rows [begin, end) of a sequence, in order: each is the one before it and the sum of its
// own rows, so that its bits don't depend on how the rows came.
template <typename T>
void write_states(const Problem& p, int sequence, int kv_head, int begin, int end) {
  const int first = begin / p.state_rows, start = first_to_sum(p, sequence, first);
  std::vector<float> total(p.head_dim);
  if (start > 0) {
    const float* before = state_before(p, sequence, kv_head, start * p.state_rows);
    std::copy_n(before, p.head_dim, total.begin());
  }
  for (int state = start; state < end / p.state_rows; ++state) {
    const T* rows = value_row<T>(p, sequence, kv_head, state * p.state_rows);
    for (int d = 0; d < p.head_dim; d += kLanes) {
      store16(&total[d], load16(&total[d]) + sum_rows(p, rows, p.state_rows, d));
    }
    if (state < first) continue;
    std::copy(total.begin(), total.end(), state_before(p, sequence, kv_head, (state + 1) * p.state_rows));
  }
}

}  // namespace topt
