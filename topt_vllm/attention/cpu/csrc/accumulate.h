// acc[m, :] += sum_i weights[m, i] * rows[i][:]: the gathered V rows of one query row.
#pragma once

#include "vector.h"

namespace topt {

template <int MT, int C, typename T>
inline void accumulate_tile(float* acc, int64_t acc_stride, const float* weights, int64_t weight_stride,
                            const T* const* rows, int count, int dim) {
  Vec16 sum[MT][C];
TOPT_UNROLL
  for (int m = 0; m < MT; ++m) {
TOPT_UNROLL
    for (int c = 0; c < C; ++c) sum[m][c] = load16(acc + m * acc_stride + dim + c * kLanes);
  }
  for (int i = 0; i < count; ++i) {
    Vec16 row[C];
TOPT_UNROLL
    for (int c = 0; c < C; ++c) row[c] = load16(rows[i] + dim + c * kLanes);
TOPT_UNROLL
    for (int m = 0; m < MT; ++m) {
      const Vec16 weight(weights[m * weight_stride + i]);
TOPT_UNROLL
      for (int c = 0; c < C; ++c) sum[m][c] = fma16(weight, row[c], sum[m][c]);
    }
  }
TOPT_UNROLL
  for (int m = 0; m < MT; ++m) {
TOPT_UNROLL
    for (int c = 0; c < C; ++c) store16(acc + m * acc_stride + dim + c * kLanes, sum[m][c]);
  }
}

template <int MT, typename T>
inline void accumulate_vectors(float* acc, int head_dim, const float* weights, int64_t weight_stride,
                               const T* const* rows, int count) {
  int d = 0;
  for (; d + kTileColumns * kLanes <= head_dim; d += kTileColumns * kLanes) {
    accumulate_tile<MT, kTileColumns>(acc, head_dim, weights, weight_stride, rows, count, d);
  }
  for (; d < head_dim; d += kLanes) {
    accumulate_tile<MT, 1>(acc, head_dim, weights, weight_stride, rows, count, d);
  }
}

// acc [vectors, head_dim], weights [vectors, weight_stride].
template <typename T>
inline void accumulate(float* acc, int vectors, int head_dim, const float* weights, int64_t weight_stride,
                       const T* const* rows, int count) {
  for (int m = 0; m < vectors; m += kTileRows) {
    float* target = acc + static_cast<int64_t>(m) * head_dim;
    const float* weight = weights + m * weight_stride;
    switch (vectors - m) {
      case 1:
        accumulate_vectors<1>(target, head_dim, weight, weight_stride, rows, count);
        break;
      case 2:
        accumulate_vectors<2>(target, head_dim, weight, weight_stride, rows, count);
        break;
      case 3:
        accumulate_vectors<3>(target, head_dim, weight, weight_stride, rows, count);
        break;
      default:
        accumulate_vectors<4>(target, head_dim, weight, weight_stride, rows, count);
    }
  }
}

}  // namespace topt
