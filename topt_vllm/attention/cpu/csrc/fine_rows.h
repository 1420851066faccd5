// Rows of the copy of K that both planes are read of, and the order of the query's codes for them.
#pragma once

#include <cstdint>

#include "screen_block.h"

namespace topt {

// Channels of the words that dot_rows takes at once, where so many are left.
constexpr int kChunkChannels = 64;

// Where a channel's 16-bit code lies: dot_rows takes whole chunks of words, first the lower nibbles of all.
inline int fine_place(int d, int dim) {
  const int chunk = d / kChunkChannels * kChunkChannels, word = d % kChunkChannels / kWordChannels;
  if (chunk + kChunkChannels > dim) return d;
  return chunk + d % kWordChannels / kWordBytes * (kChunkChannels / 2) + word * kWordBytes + d % kWordBytes;
}

// Rows that both planes are read of at a time: so many share the loads of queries and one sum across lanes.
constexpr int kFineRows = 4;

// Their first words of plane one, which the others follow at the distance of a group's rows, and of plane two.
struct FineRows {
  const uint8_t *one[kFineRows], *two[kFineRows];
};

}  // namespace topt
