// acc[m, :] += sum_i weights[m, i] * rows[i][:]: the gathered V rows of one query row.
#pragma once

#include "ahead.h"
#include "bytes.h"
#include "vector.h"

namespace topt {

// Distance in rows between asking and adding, where rows were not asked for before.
constexpr int kRowsAhead = 16;

// Vectors of a register tile: the more, the fewer passes widen the rows. Elements of one byte need tables in registers.
template <typename T>
constexpr int kSumRows = kIsByte<T> ? kTileRows : kMostTileRows;

template <int MT, int C, typename T>
inline void accumulate_tile(float* acc, int64_t acc_stride, const float* weights, int64_t weight_stride,
                            const T* const* rows, int count, int dim, int ask_dim) {
  Vec16 sum[MT][C];
  TOPT_UNROLL
  for (int m = 0; m < MT; ++m) {
    TOPT_UNROLL
    for (int c = 0; c < C; ++c) sum[m][c] = load16(acc + m * acc_stride + dim + c * kLanes);
    Columns<T, C>::reorder(sum[m]);
  }
  const Columns<T, C> columns;
  for (int i = 0; i < count; ++i) {
    for (int d = 0; d < ask_dim && i + kRowsAhead < count; d += kLineBytes / static_cast<int>(sizeof(T))) {
      ask(rows[i + kRowsAhead] + d);
    }
    Vec16 row[C];
    columns.load(rows[i] + dim, row);
    TOPT_UNROLL
    for (int m = 0; m < MT; ++m) {
      const Vec16 weight(weights[m * weight_stride + i]);
      TOPT_UNROLL
      for (int c = 0; c < C; ++c) sum[m][c] = fma16(weight, row[c], sum[m][c]);
    }
  }
  TOPT_UNROLL
  for (int m = 0; m < MT; ++m) {
    columns.reorder(sum[m]);
    TOPT_UNROLL
    for (int c = 0; c < C; ++c) store16(acc + m * acc_stride + dim + c * kLanes, sum[m][c]);
  }
}

// acc [vectors, head_dim], weights [vectors, weight_stride]. `ask_rows`: rows were not asked for but the first few.
template <typename T>
inline void accumulate(float* acc, int vectors, int head_dim, const float* weights, int64_t weight_stride,
                       const T* const* rows, int count, bool ask_rows) {
  in_register_tiles<kSumRows<T>>(vectors, [&](auto tile, int m) {
    float* target = acc + static_cast<int64_t>(m) * head_dim;
    const float* weight = weights + m * weight_stride;
    int d = 0;
    // The first pass asks for whole rows.
    const auto ask_dim = [&] { return ask_rows && m == 0 && d == 0 ? head_dim : 0; };
    constexpr int columns = kTileColumns<tile()>;
    for (; d + columns * kLanes <= head_dim; d += columns * kLanes) {
      accumulate_tile<tile(), columns>(target, head_dim, weight, weight_stride, rows, count, d, ask_dim());
    }
    for (; d < head_dim; d += kLanes) {
      accumulate_tile<tile(), 1>(target, head_dim, weight, weight_stride, rows, count, d, ask_dim());
    }
  });
}

}  // namespace topt
