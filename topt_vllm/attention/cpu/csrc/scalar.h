// The operator as plain loops, one row and head at a time: the check of the vector kernel, without its splits,
// tiles, running maximum or lists. It takes no screen, which the reference operator checks.
#pragma once

#include <algorithm>
#include <vector>

#include "decode.h"

namespace topt {

template <typename T>
void decode_scalar(const Problem& p, Counts& counts, double& dropped_mass) {
  const int group = p.group();
  std::vector<float> scores, sums(p.head_dim), query(p.head_dim), result(p.head_dim);
  std::vector<char> kept, read;
  for (int sequence = 0; sequence < p.num_sequences; ++sequence) {
    const int32_t* table = p.block_table + sequence * p.block_table_stride;
    for (int row = p.query_start_loc[sequence]; row < p.query_start_loc[sequence + 1]; ++row) {
      const int n = std::max(0, row_length(p, sequence, row));
      for (int kv_head = 0; kv_head < p.num_kv_heads; ++kv_head) {
        scores.assign(static_cast<size_t>(group) * n, 0.0f);
        kept.assign(static_cast<size_t>(group) * n, 0);
        read.assign(n, 0);
        counts.keys += n, counts.candidates += n;
        for (int g = 0; g < group; ++g) {
          const KeepRule rule = keep_rule(p, row, kv_head * group + g, n);
          load_row(p.query, row, kv_head * group + g, p.head_dim, query.data());
          for (int j = 0; j < n; ++j) {
            const T* key = static_cast<const T*>(p.key) + table[j / p.block_size] * p.key_block_stride +
                           kv_head * p.key_head_stride + j % p.block_size;
            float score = 0;
            for (int d = 0; d < p.head_dim; ++d) score += query[d] * static_cast<float>(key[d * p.key_dim_stride]);
            score *= p.scale * p.key_scale;
            if (p.softcap > 0) score = p.softcap * std::tanh(score / p.softcap);
            const bool keep = rule.dense || score >= rule.theta || j < rule.low || j >= rule.high;
            scores[g * n + j] = score;
            kept[g * n + j] = keep;
            read[j] |= keep;
            counts.kept += keep;
            if (p.reached && !rule.dense) p.reached[row * p.num_heads + kv_head * group + g] += score >= rule.theta;
          }
        }
        bool drops = false;
        for (int j = 0; j < n; ++j) {
          counts.read += read[j];
          for (int g = 0; g < group; ++g) drops |= !(p.keep_union ? read[j] : kept[g * n + j]);
        }
        auto value_at = [&](int j) { return value_row<T>(p, sequence, kv_head, j); };
        const int tail = n > 0 && p.vmean && drops ? sums_end(p, n) : n;
        for (int d = 0; d < p.head_dim; ++d) {
          sums[d] = tail < n && tail > 0 ? state_before(p, sequence, kv_head, tail)[d] : 0.0f;
          for (int j = tail; j < n; ++j) sums[d] += static_cast<float>(value_at(j)[d]);
        }
        for (int g = 0; g < group; ++g) {
          float largest = -std::numeric_limits<float>::infinity();
          for (int j = 0; j < n; ++j) largest = std::max(largest, scores[g * n + j]);
          std::vector<float> acc(p.head_dim, 0.0f);
          double used = 0, dropped = 0;
          for (int j = 0; j < n; ++j) {
            const float weight = std::exp(scores[g * n + j] - largest);
            const bool use = p.keep_union ? read[j] : kept[g * n + j];
            (use ? used : dropped) += weight;
            for (int d = 0; d < p.head_dim && use; ++d) acc[d] += weight * static_cast<float>(value_at(j)[d]);
          }
          const double total = used + dropped + sink_weight(p, kv_head * group + g, largest);
          if (n > 0) dropped_mass += dropped / total;
          for (int d = 0; d < p.head_dim; ++d) {
            double value = n > 0 ? acc[d] / total : 0.0;
            if (p.vmean && drops) value += dropped / total * sums[d] / n;
            result[d] = static_cast<float>(value * p.value_scale);
          }
          store_row(p.out, row, kv_head * group + g, p.head_dim, result.data());
        }
      }
    }
  }
}

}  // namespace topt
