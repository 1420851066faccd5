// Equal amounts of K for every thread: the tiles of all (sequence, KV head, rows) items form one line, which is cut
// into units of equal length. An item that a cut divides is merged from its segments by whoever finishes last.
#pragma once

#include <algorithm>
#include <atomic>
#include <vector>

#include "problem.h"

namespace topt {

constexpr int kMaxItemRows = 8;

struct Item {
  int sequence, kv_head;
  int row, rows;        // query rows, at most kMaxItemRows
  int context;          // of the last row
  bool screened;        // by the copy of K, all rows alike
  int tiles;            // of tile_blocks
  int64_t first_tile;   // position on the line
};

struct Schedule {
  std::vector<Item> items;
  std::vector<int> remaining;  // tiles of each item that are not processed yet
  int64_t tiles = 0, tokens = 0;
  int units = 0;

  int64_t unit_begin(int unit) const { return tiles * unit / units; }
  int unit_of(int64_t tile) const {
    int unit = static_cast<int>(tile * units / tiles);
    while (unit_begin(unit + 1) <= tile) ++unit;
    while (unit_begin(unit) > tile) --unit;
    return unit;
  }
  // A unit has at most two segments of divided items: one that goes on from the unit before it, one that starts here.
  int slot(int unit, const Item& item) const { return 2 * unit + (item.first_tile >= unit_begin(unit) ? 1 : 0); }
};

struct Counts {
  int64_t kept = 0, read = 0;
  int64_t keys = 0;        // K rows read in full
  int64_t candidates = 0;  // those that a screen lets through, or all of them
};

// What the threads of one call share.
struct Shared {
  Schedule schedule;
  std::vector<float> slots;        // [2 units, Softmax::size], segments of divided items
  std::vector<Counts> counts;      // [units]
  std::vector<double> dropped;     // [items], dropped probability
  std::vector<char> scratch;       // [threads, Scratch::bytes]
  std::atomic<int> next_unit{0};
};

inline int blocks_of(const Problem& p, const Item& item) {
  return item.context > 0 ? (item.context + p.block_size - 1) / p.block_size : 0;
}

// Query rows of one KV head, `rows` from `row` on, as items: rows that a screen serves and others part ways.
inline void add_items(const Problem& p, int sequence, int kv_head, int row, int rows, Schedule& s) {
  const int end = row + rows;
  const auto screened = [&](int at) { return is_screened(p, at, kv_head, row_length(p, sequence, at)); };
  while (row < end) {
    const bool kind = screened(row);
    int next = p.screen.codes ? row + 1 : end;
    while (next < end && screened(next) == kind) ++next;
    const int context = row_length(p, sequence, next - 1), tile = tile_blocks(p, kind) * p.block_size;
    const int tiles = std::max(1, (context + tile - 1) / tile);
    s.items.push_back({sequence, kv_head, row, next - row, context, kind, tiles, s.tiles});
    s.tiles += tiles, s.tokens += context;
    row = next;
  }
}

// Fills `s` in place, so that its memory is reused from call to call.
inline void plan(const Problem& p, int threads, Schedule& s) {
  s.items.clear();
  s.tiles = s.tokens = 0;
  for (int sequence = 0; sequence < p.num_sequences; ++sequence) {
    const int end = p.query_start_loc[sequence + 1];
    for (int row = p.query_start_loc[sequence]; row < end; row += kMaxItemRows) {
      for (int kv_head = 0; kv_head < p.num_kv_heads; ++kv_head) {
        add_items(p, sequence, kv_head, row, std::min(kMaxItemRows, end - row), s);
      }
    }
  }
  s.remaining.resize(s.items.size());
  for (size_t i = 0; i < s.items.size(); ++i) s.remaining[i] = s.items[i].tiles;
  // Several units a thread even out what selection and other load make uneven; a unit below 1,024 tokens isn't worth
  // its merge.
  const int64_t wanted = threads == 1 ? 1 : std::min<int64_t>(8 * threads, std::max<int64_t>(threads, s.tokens / 1024));
  s.units = static_cast<int>(std::min(wanted, s.tiles));
}

}  // namespace topt
