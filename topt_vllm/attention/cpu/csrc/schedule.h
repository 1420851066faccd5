// Equal amounts of K for every thread: the tiles of all (sequence, KV head, rows) items form one line, of which each
// worker owns a part. It takes the units of its own part first, then what others left of theirs. An item that a cut
// divides is merged from its segments by whoever finishes last.
#pragma once

#include <algorithm>
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
  std::vector<int64_t> unit_begins;  // [units + 1], positions on the line
  std::vector<int> first_units;      // [workers + 1], of each part

  int units() const { return static_cast<int>(unit_begins.size()) - 1; }
  int workers() const { return static_cast<int>(first_units.size()) - 1; }
  int unit_of(int64_t tile) const {
    return static_cast<int>(std::upper_bound(unit_begins.begin(), unit_begins.end(), tile) - unit_begins.begin()) - 1;
  }
  // A unit has at most two segments of divided items: one that goes on from the unit before it, one that starts here.
  int slot(int unit, const Item& item) const { return 2 * unit + (item.first_tile >= unit_begins[unit] ? 1 : 0); }
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
  std::vector<int> next_units;     // [workers], of each part
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

// Each cut costs a merge and the start of another segment, so units have no fewer tokens and no less of a part.
constexpr int kLeastUnitTokens = 1024, kLeastUnitShare = 32;

// Selection and other load make threads uneven. Units of half of what is left of a part leave little to wait for in the
// end, with few cuts.
inline void cut(int threads, Schedule& s) {
  s.unit_begins.clear();
  s.first_units.clear();
  const auto workers = std::min<int64_t>(threads, s.tiles);
  const int64_t least = std::max<int64_t>({1, s.tiles / workers / kLeastUnitShare,
                                           kLeastUnitTokens * s.tiles / std::max<int64_t>(s.tokens, 1)});
  for (int64_t worker = 0; worker < workers; ++worker) {
    s.first_units.push_back(static_cast<int>(s.unit_begins.size()));
    const int64_t end = s.tiles * (worker + 1) / workers;
    for (int64_t at = s.tiles * worker / workers; at < end;) {
      s.unit_begins.push_back(at);
      const int64_t left = end - at;
      at = workers == 1 || left < 2 * least ? end : at + (left + 1) / 2;
    }
  }
  s.first_units.push_back(static_cast<int>(s.unit_begins.size()));
  s.unit_begins.push_back(s.tiles);
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
  cut(threads, s);
}

}  // namespace topt
