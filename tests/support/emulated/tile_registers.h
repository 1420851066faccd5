// In place of the kernel's file of that name: AMX's tile registers in memory.
#pragma once

#include <cstdint>
#include <cstring>

#include "avx512.h"

namespace topt {

struct TileShapes {
  uint8_t palette, row_bytes[16], rows[16];
};

struct Tile {
  uint8_t rows;
  alignas(64) uint8_t row[16][64];
};
inline thread_local Tile tiles[7];

inline void configure_tiles(const TileShapes& shapes) {
  for (int tile = 0; tile < 7; ++tile) tiles[tile].rows = shapes.rows[tile];
}
inline void release_tiles() {}

template <int tile>
void load_tile(const void* from, int64_t row_bytes) {
  for (int r = 0; r < tiles[tile].rows; ++r) {
    std::memcpy(tiles[tile].row[r], static_cast<const char*>(from) + r * row_bytes, 64);
  }
}
template <int tile>
void store_tile(void* to, int64_t row_bytes) {
  for (int r = 0; r < tiles[tile].rows; ++r) {
    std::memcpy(static_cast<char*>(to) + r * row_bytes, tiles[tile].row[r], 64);
  }
}
template <int tile>
void clear_tile() {
  std::memset(tiles[tile].row, 0, sizeof(tiles[tile].row));
}
template <int c, int a, int b>
void multiply_tiles() {
  for (int m = 0; m < tiles[c].rows; ++m) {
    const emulated::Lanes<uint16_t> vector(emulated::load<__m512i>(tiles[a].row[m]));
    emulated::Lanes<float> sums(emulated::load<__m512>(tiles[c].row[m]));
    for (int pair = 0; pair < tiles[b].rows; ++pair) {
      const emulated::Lanes<uint16_t> row(emulated::load<__m512i>(tiles[b].row[pair]));
      for (int i = 0; i < 32; ++i) {
        sums[i / 2] += emulated::of_bfloat16(vector[2 * pair + i % 2]) * emulated::of_bfloat16(row[i]);
      }
    }
    std::memcpy(tiles[c].row[m], sums.lane, 64);
  }
}

}  // namespace topt
