// As nibbles_vnni.h, which has the comments, with the same sums: by the compiler.
#pragma once

#include "ahead.h"
#include "fine_rows.h"

namespace topt {

struct RowSums {
  alignas(64) int32_t row[kLanes];
};
inline Vec16 to_float(const RowSums& sums) {
  alignas(64) float lanes[kLanes];
  for (int i = 0; i < kLanes; ++i) lanes[i] = static_cast<float>(sums.row[i]);
  return load16(lanes);
}

template <int MT>
TOPT_INLINE void dot_group(const uint8_t* codes, const int8_t* query, int dim, const char* ahead, RowSums (&sums)[MT]) {
  for (int m = 0; m < MT; ++m) {
    for (int row = 0; row < kLanes; ++row) {
      int32_t sum = 0;
      for (int d = 0; d < dim; d += kWordChannels) {
        const uint8_t* word = codes + d * kLanes / 2 + row * kWordBytes;
        if (ahead && m == 0 && row % 8 == 0) ask(ahead + (word - codes));
        const int8_t* q = query + m * dim + d;
        for (int i = 0; i < kWordBytes; ++i) sum += (word[i] & 15) * q[i] + (word[i] >> 4) * q[i + kWordBytes];
      }
      sums[m].row[row] = sum;
    }
  }
}

inline RowSums plus(RowSums sums, const int32_t* other) {
  for (int i = 0; i < kLanes; ++i) {
    sums.row[i] = static_cast<int32_t>(static_cast<uint32_t>(sums.row[i]) + static_cast<uint32_t>(other[i]));
  }
  return sums;
}

template <int MT>
TOPT_INLINE RowSums dot_rows(const FineRows& rows, const int16_t* query, int dim) {
  RowSums sums;
  for (int m = 0; m < MT; ++m) {
    for (int row = 0; row < kFineRows; ++row) {
      uint32_t sum = 0;
      for (int d = 0; d < dim; d += kWordChannels) {
        const uint8_t *one = rows.one[row] + d * kLanes / 2, *two = rows.two[row] + d / 2;
        const int16_t* low = query + m * dim + fine_place(d, dim);
        const int16_t* high = query + m * dim + fine_place(d + kWordBytes, dim);
        for (int i = 0; i < kWordBytes; ++i) {
          sum += static_cast<uint32_t>(((one[i] & 15) << 4 | (two[i] & 15)) * low[i]);
          sum += static_cast<uint32_t>(((one[i] & 0xf0) | two[i] >> 4) * high[i]);
        }
      }
      sums.row[kFineRows * m + row] = static_cast<int32_t>(sum);
    }
  }
  return sums;
}

}  // namespace topt
