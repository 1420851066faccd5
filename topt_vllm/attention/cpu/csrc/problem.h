// One decode call in raw pointers. No torch type appears in it, so the kernel can be read and built alone.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>

namespace topt {

// Query and output have one of the first three, the cache any.
enum class DType : int { kBFloat16, kHalf, kFloat, kE4M3, kE5M2 };

// Strides are in elements.
struct Rows {
  void* data;
  DType dtype;
  int64_t row_stride;
  int64_t head_stride;
  int64_t dim_stride;
};

// A low-bit copy of K beside it (screen_block.h), and what is calibrated for it.
struct KeyScreen {
  char* codes;  // [B, Hkv, ScreenBlock::bytes], or null for no screen
  int64_t block_stride;
  const float *mean, *scale;  // [Hkv, D]
  const float* signs;         // [D]
  const float* factor;        // [Hkv, D], signs / scale; for writing alone
  float margin;               // standard deviations, unless the bound is a hard one
  bool hard;
  int min_seq_len;  // rows with n <= it aren't screened
};

struct Problem {
  Rows query;  // [R, H, D]
  Rows out;    // [R, H, D]

  const void* key;    // [B, Hkv, D, P]: the tokens of a block are contiguous
  const void* value;  // [B, Hkv, P, D]
  int64_t key_block_stride, key_head_stride, key_dim_stride;
  int64_t value_block_stride, value_head_stride, value_token_stride;
  float key_scale, value_scale;  // K and V are what is stored times these
  float* value_sums;  // [B, Hkv, P / state_rows, D], or null
  int64_t sums_block_stride, sums_head_stride, sums_state_stride;
  int state_rows;  // divides the block size, which it is where there are no sums
  KeyScreen screen;

  const int32_t* query_start_loc;  // [S + 1]
  const int32_t* seq_lens;         // [S]
  const int32_t* block_table;      // [S, max blocks]
  int64_t block_table_stride;

  const int32_t* lengths;  // [L], null for theta = -inf everywhere
  const float* theta;      // [H, L]
  const float* law;        // [H, 2]
  int num_lengths;
  const float* row_theta;  // [R, H], in place of lengths, theta and law; or null
  int64_t* reached;        // [R, H], keys that reach theta are added where a row has one; or null
  const float* sinks;      // [H], logits that take probability and have no V row; or null

  int num_sequences, num_heads, num_kv_heads, head_dim, block_size;
  int64_t num_blocks;  // of the cache
  int min_seq_len, sink_tokens, recent_tokens;
  bool keep_union, vmean;
  float scale, softcap;

  // A tile is what is scored before selection: of K that is read in full one block, or several small ones; of its copy
  // more, for few of those keys are candidates.
  int blocks_per_tile, blocks_per_screened_tile;

  int group() const { return num_heads / num_kv_heads; }
};

inline int tile_blocks(const Problem& p, bool screened) {
  return screened ? p.blocks_per_screened_tile : p.blocks_per_tile;
}
inline int largest_tile(const Problem& p) {
  return std::max(p.blocks_per_tile, p.blocks_per_screened_tile) * p.block_size;
}

// Tiles of about eight pages of K, which ahead.h walks side by side, and of 128 tokens at least.
inline int choose_blocks_per_tile(int head_dim, int block_size, int element_size) {
  const int bytes = 32768 / (head_dim * block_size * element_size), tokens = 128 / block_size;
  return bytes > tokens ? (bytes > 1 ? bytes : 1) : (tokens > 1 ? tokens : 1);
}

// Tokens of a tile of the copy, where eight tiles are left for each thread: enough candidates for loops that pay, few
// enough scores for the first cache.
constexpr int kScreenedTile = 512;
inline int choose_screened_blocks(const Problem& p, int threads) {
  int64_t tokens = 0;
  for (int sequence = 0; sequence < p.num_sequences; ++sequence) tokens += p.seq_lens[sequence];
  const int64_t share = tokens * p.num_kv_heads / (8 * threads);
  return std::max(p.blocks_per_tile, static_cast<int>(std::min<int64_t>(share, kScreenedTile)) / p.block_size);
}

// Context length of a query row of a sequence.
inline int row_length(const Problem& p, int sequence, int row) {
  return p.seq_lens[sequence] - (p.query_start_loc[sequence + 1] - 1 - row);
}

// Position of the first row of a sequence in this batch.
inline int first_written(const Problem& p, int sequence) {
  const int rows = p.query_start_loc[sequence + 1] - p.query_start_loc[sequence];
  return p.seq_lens[sequence] > rows ? p.seq_lens[sequence] - rows : 0;
}

// theta(n) of one head, with the roundings of Thetas.at in common.py.
inline float theta_at(const Problem& p, int head, int n) {
  const int last = p.num_lengths - 1;
  if (p.num_lengths == 0 || n < p.lengths[0]) return -std::numeric_limits<float>::infinity();
  if (n > p.lengths[last]) {
    return p.law[2 * head] + p.law[2 * head + 1] * static_cast<float>(std::log(static_cast<double>(n)));
  }
  const float* theta = p.theta + static_cast<int64_t>(head) * p.num_lengths;
  int right = 0;
  while (p.lengths[right] < n) ++right;
  if (p.lengths[right] == n) return theta[right];
  const double low = p.lengths[right - 1];
  const float weight = static_cast<float>(std::log2(n / low) / std::log2(p.lengths[right] / low));
  const float start = theta[right - 1], end = theta[right];
  return weight < 0.5f ? std::fma(weight, end - start, start) : std::fma(weight - 1.0f, end - start, end);
}

// exp of a head's sink relative to `reference`, which takes probability as one more key would; 0 without one. Beyond the
// range of floats it is infinite: no key has probability beside it then.
inline float sink_weight(const Problem& p, int head, float reference) {
  return p.sinks ? std::exp(p.sinks[head] - reference) : 0.0f;
}

// First of the rows behind the last V sum that a row with context n reads. One that ends a state doesn't need it.
inline int sums_end(const Problem& p, int n) { return (n - 1) / p.state_rows * p.state_rows; }

// What one row of one head keeps whatever its score: keys below `low`, keys from `high` on, or all of them.
struct KeepRule {
  int n;
  int low, high;
  float theta;
  bool dense;
};

inline KeepRule keep_rule(const Problem& p, int row, int head, int n) {
  const float theta = p.row_theta ? p.row_theta[static_cast<int64_t>(row) * p.num_heads + head] : theta_at(p, head, n);
  KeepRule rule{n, p.sink_tokens, n - p.recent_tokens, theta, false};
  if (p.vmean && sums_end(p, n) < rule.high) rule.high = sums_end(p, n);
  rule.dense = n <= p.min_seq_len || rule.theta == -std::numeric_limits<float>::infinity();
  return rule;
}

// Whether the heads of one KV head all have something to drop in a row with context n; K is read where they don't.
inline bool is_screened(const Problem& p, int row, int kv_head, int n) {
  bool screened = p.screen.codes && n > p.screen.min_seq_len;
  for (int g = 0; g < p.group() && screened; ++g) {
    const KeepRule rule = keep_rule(p, row, kv_head * p.group() + g, n);
    screened = !rule.dense && rule.low < rule.high;
  }
  return screened;
}

}  // namespace topt
