// Top-Theta decode of a batch: one pass over K per item, V rows gathered for the survivors, exact merge of splits.
#pragma once

#include <atomic>
#include <cstring>

#include "accumulate.h"
#include "amx.h"
#include "bytes.h"
#include "schedule.h"
#include "score.h"
#include "screen.h"
#include "sums.h"

namespace topt {

// Running softmax of the query vectors of an item over a part of its context.
struct Softmax {
  float* max;      // [M], reference of the exponents, not above the true maximum by construction of `raise`
  float* used;     // [M, 16], sum of exp over keys whose V row was used, by lane
  float* dropped;  // [M, 16], sum of exp over the others
  float* acc;      // [M, D]
  float* skipped;  // [rows], keys that some head dropped: more than 0 calls for compensation

  static int64_t size(const Problem& p) {
    return static_cast<int64_t>(kMaxItemRows) * (p.group() * (p.head_dim + 2 * kLanes + 1) + kLanes);
  }
  Softmax(const Problem& p, int rows, float* memory) {
    const int vectors = rows * p.group();
    acc = memory;
    used = acc + static_cast<int64_t>(vectors) * p.head_dim;
    dropped = used + vectors * kLanes;
    skipped = dropped + vectors * kLanes;
    max = skipped + rows;
  }
  void clear(const Problem& p, int rows) {
    const int vectors = rows * p.group();
    std::memset(acc, 0, sizeof(float) * (static_cast<int64_t>(vectors) * p.head_dim));
    std::fill_n(max, vectors, std::numeric_limits<float>::lowest());
    std::memset(used, 0, sizeof(float) * (2 * vectors * kLanes + rows));
  }
};

// Exponents may exceed the reference by this much before it is raised: fewer rescales, far from overflow.
constexpr float kMaxSlack = 8.0f;
// V rows that make it worth loading the accumulators.
constexpr int kFlushRows = 32;
// Tokens between those that are screened and those whose codes are asked for.
constexpr int kScreenAhead = 128;

// Everything one thread needs, carved from one allocation that outlives the call.
template <typename T>
struct Scratch {
  float *scores, *query, *weights, *softmax, *sums;
  c10::BFloat16* pairs;
  const T** rows;
  uint32_t *kept, *marks, *read, *candidates;
  int32_t *listed, *ends;
  float* fine;
  KeepRule* rules;
  ScreenQueries screen;
  TileRegisters tiles;
  int count[kMaxItemRows];
  int64_t size = 0;

  static int64_t capacity(const Problem& p) { return kFlushRows + largest_tile(p) + kLanes; }
  // Of one thread's part, in whole pages.
  static int64_t bytes(const Problem& p) { return (Scratch(p, nullptr).size + 4095) / 4096 * 4096; }

  Scratch(const Problem& p, char* memory) {
    const int64_t vectors = static_cast<int64_t>(kMaxItemRows) * p.group(), tile = largest_tile(p);
    auto carve = [&](auto*& pointer, int64_t count) {
      using Element = std::remove_reference_t<decltype(*pointer)>;
      pointer = reinterpret_cast<Element*>(reinterpret_cast<uintptr_t>(memory) + size);
      size += (count * static_cast<int64_t>(sizeof(Element)) + 63) / 64 * 64;
    };
    // Scores and candidates of two tiles: the screen runs one ahead.
    carve(scores, 2 * vectors * tile);
    carve(query, vectors * p.head_dim);
    carve(weights, vectors * capacity(p));
    carve(softmax, Softmax::size(p));
    carve(sums, p.head_dim);
    carve(pairs, vectors * p.head_dim);
    carve(rows, kMaxItemRows * capacity(p));
    carve(kept, tile / kLanes * vectors);
    carve(marks, tile / kLanes * kMaxItemRows);
    carve(read, tile / kLanes);
    carve(candidates, 2 * (tile / kLanes));
    carve(listed, 2 * (tile + kLanes));
    carve(ends, 2 * p.blocks_per_screened_tile);
    carve(fine, vectors * tile);
    carve(rules, vectors);
    carve(screen.codes, vectors * p.head_dim);
    carve(screen.fine, vectors * p.head_dim);
    carve(screen.of, vectors);
    carve(screen.fine_bias, kFineRows * (vectors + 4));
    carve(screen.fine_half, kFineRows * (vectors + 4));
    carve(screen.fine_factor, kFineRows * (vectors + 4));
    carve(screen.offset, kFineRows * (vectors + 4));
    carve(screen.rotated, p.head_dim);
    screen.dim = p.head_dim;
  }
};

template <typename F>
auto with_dtype(DType dtype, F&& visit) {
  switch (dtype) {
    case DType::kBFloat16: return visit(c10::BFloat16());
    case DType::kHalf: return visit(c10::Half());
    default: return visit(float());
  }
}

// The same for what a cache may hold.
template <typename F>
auto with_stored(DType dtype, F&& visit) {
  switch (dtype) {
    case DType::kE4M3: return visit(E4M3());
    case DType::kE5M2: return visit(E5M2());
    default: return with_dtype(dtype, visit);
  }
}

// One row of one head to or from float32 [D].
inline void load_row(const Rows& rows, int64_t row, int64_t head, int dim, float* target) {
  with_dtype(rows.dtype, [&](auto element) {
    const auto* from = static_cast<const decltype(element)*>(rows.data) + row * rows.row_stride + head * rows.head_stride;
    for (int d = 0; d < dim && rows.dim_stride == 1; d += kLanes) store16(target + d, load16(from + d));
    for (int d = 0; d < dim && rows.dim_stride != 1; ++d) target[d] = from[d * rows.dim_stride];
  });
}

inline void store_row(const Rows& rows, int64_t row, int64_t head, int dim, const float* source) {
  with_dtype(rows.dtype, [&](auto element) {
    auto* to = static_cast<decltype(element)*>(rows.data) + row * rows.row_stride + head * rows.head_stride;
    for (int d = 0; d < dim; ++d) to[d * rows.dim_stride] = source[d];
  });
}

// The keys of a tile that a row selects from, in the order of their positions: all that it sees, or candidates alone.
struct Keys {
  int start;              // position of the first, where they follow each other
  const int32_t* listed;  // or the positions
  int count, seen;        // here, and in all
  int low, high;          // those outside [low, high) are kept whatever their score
  float* scores;          // [M, tile]
};

template <typename T>
class Decoder {
 public:
  Decoder(const Problem& problem, Scratch<T>& scratch) : p(problem), s(scratch), group(problem.group()) {}

  // Adds tiles [begin, end) of an item to a cleared softmax, and asks for what is read later: the item's tiles up to
  // `asked_end`, then those of the item `after` it, if any.
  void segment(const Item& item, int begin, int end, int asked_end, const Item* after, Softmax& softmax,
               Counts& counts) {
    load_queries(item);
    std::fill_n(s.count, item.rows, 0);
    if (screened) screen(item, begin, asked_end, after);
    if (p.vmean && !dense && end == item.tiles) ask_sums(item);
    for (int tile = begin; tile < end; ++tile) {
      if (screened && tile + 1 < end) screen(item, tile + 1, asked_end, after);
      turn_to(tile);
      if (screened) {
        refine(item, tile, counts);
      } else {
        score(item, tile, asked_end, after, counts);
      }
      for (int row = 0; row < item.rows; row += list_rows) {
        if (s.count[row] >= kFlushRows) flush(row, softmax);
        select(item, row, tile, softmax, counts);
      }
    }
    for (int row = 0; row < item.rows; row += list_rows) flush(row, softmax);
  }

  // Writes the rows of an item from its finished softmax; returns the dropped probability, summed over its heads.
  double finish(const Item& item, const Softmax& softmax) {
    double dropped = 0;
    for (int row = 0; row < item.rows; ++row) {
      const int n = row_length(p, item.sequence, item.row + row);
      const bool compensate = p.vmean && softmax.skipped[row] > 0;
      if (compensate) sum_context<T>(p, item.sequence, item.kv_head, n, s.sums);
      for (int g = 0; g < group; ++g) {
        const int m = row * group + g, head = item.kv_head * group + g;
        const float* acc = softmax.acc + static_cast<int64_t>(m) * p.head_dim;
        const float lost = sum16(load16(softmax.dropped + m * kLanes));
        // Here alone, where all parts of the context are merged, so that a sink counts once.
        const float total = sum16(load16(softmax.used + m * kLanes)) + lost + sink_weight(p, head, softmax.max[m]);
        const float share = n > 0 ? lost / total : 0.0f;
        const float norm = n > 0 ? p.value_scale / total : 0.0f;
        // A row of NaN would make the sum NaN for good.
        if (share == share) dropped += share;
        float* result = s.query;
        for (int d = 0; d < p.head_dim; d += kLanes) store16(result + d, load16(acc + d) * Vec16(norm));
        const Vec16 mean(p.value_scale * share / static_cast<float>(n));
        for (int d = 0; d < p.head_dim && compensate; d += kLanes) {
          store16(result + d, fma16(mean, load16(s.sums + d), load16(result + d)));
        }
        store_row(p.out, item.row + row, head, p.head_dim, result);
      }
    }
    return dropped;
  }

 private:
  const Problem& p;
  Scratch<T>& s;
  const int group;
  Queries queries{};
  const T* next_key = nullptr;            // the block of K to ask for, a tile ahead, or null
  bool dense = false;     // every head of every row keeps everything
  bool screened = false;  // by the copy of K, which stands for it
  bool tiled = false;     // tile registers score keys and add V rows; few are left behind a screen
  int list_rows = 1;      // query rows that share a list of V rows: all of an item with tiles, or where all is kept
  // Of the tile in turn.
  float* scores = nullptr;         // [M, tile]
  uint32_t* candidates = nullptr;  // a bit per token
  int32_t *listed = nullptr, *ends = nullptr;  // their positions, and how many up to the end of each block
  int forced_below = 0, forced_from = 0;  // tokens outside [forced_below, forced_from) are candidates

  // With a screen, tiles alternate between two sets of scores.
  void turn_to(int tile) {
    const int set = screened ? tile & 1 : 0;
    scores = s.scores + set * static_cast<int64_t>(queries.count) * largest_tile(p);
    candidates = s.candidates + set * (largest_tile(p) / kLanes);
    listed = s.listed + set * (largest_tile(p) + kLanes);
    ends = s.ends + set * p.blocks_per_screened_tile;
  }

  void load_queries(const Item& item) {
    dense = true;
    screened = item.screened;
    tiled = !screened && takes_tiles(item.rows * group);
    next_key = nullptr;
    forced_below = 0, forced_from = item.context;
    queries = {s.query, p.query.dtype == DType::kBFloat16 ? s.pairs : nullptr, item.rows * group, p.head_dim};
    for (int row = 0; row < item.rows; ++row) {
      const int n = row_length(p, item.sequence, item.row + row);
      for (int g = 0; g < group; ++g) {
        const int m = row * group + g, head = item.kv_head * group + g;
        s.rules[m] = keep_rule(p, item.row + row, head, n);
        dense &= s.rules[m].dense;
        forced_below = std::max(forced_below, s.rules[m].low);
        forced_from = std::min(forced_from, s.rules[m].high);
        float* wide = s.query + m * p.head_dim;
        load_row(p.query, item.row + row, head, p.head_dim, wide);
        for (int d = 0; d < p.head_dim && queries.pairs && !screened; ++d) s.pairs[m * p.head_dim + d] = wide[d];
      }
    }
    list_rows = tiled || dense ? item.rows : 1;
    s.screen.count = queries.count;
    for (int m = 0; m < queries.count && screened; ++m) {
      encode_query(p, item.kv_head, s.query + static_cast<int64_t>(m) * p.head_dim, s.rules[m].theta, m, s.screen);
    }
  }

  bool takes_tiles(int vectors) const {
    const bool fits = std::is_same_v<T, c10::BFloat16> && p.query.dtype == DType::kBFloat16 && p.head_dim % kTileDepth == 0;
    return TOPT_AMX && fits && vectors >= kLeastTileVectors;
  }

  const T* key_block(const Item& item, int block) const {
    const int64_t physical = p.block_table[item.sequence * p.block_table_stride + block];
    return static_cast<const T*>(p.key) + physical * p.key_block_stride + item.kv_head * p.key_head_stride;
  }

  // The state that each row may need in the end.
  void ask_sums(const Item& item) const {
    for (int row = 0; row < item.rows; ++row) {
      const int end = sums_end(p, s.rules[row * group].n);
      const float* state = end > 0 ? state_before(p, item.sequence, item.kv_head, end) : nullptr;
      for (int d = 0; d < p.head_dim && state; d += kLanes) ask(state + d);
    }
  }

  // K of a block of an item, of the item that follows when `block` lies past the end, or null.
  const T* later_key(const Item& item, int block, int end, const Item* after) const {
    if (block < end) return key_block(item, block);
    return after && block - end < blocks_of(p, *after) ? key_block(*after, block - end) : nullptr;
  }

  void score(const Item& item, int tile, int asked_end, const Item* after, Counts& counts) {
    const int first = tile * p.blocks_per_tile, last = std::min(first + p.blocks_per_tile, blocks_of(p, item));
    const int end = std::min(asked_end * p.blocks_per_tile, blocks_of(p, item));
    for (int block = first; block < last; ++block) {
      look_up_pages(later_key(item, block + 2 * p.blocks_per_tile, end, after));
      next_key = later_key(item, block + p.blocks_per_tile, end, after);
      const int tokens = std::min(p.block_size, item.context - block * p.block_size);
      score_block(queries, key_block(item, block), p.key_dim_stride, (tokens + kLanes - 1) / kLanes * kLanes,
                  scores + (block - first) * p.block_size, largest_tile(p), next_key, tiled ? &s.tiles : nullptr);
      count_keys(item, block * p.block_size, tokens, counts);
    }
  }

  // A request that waits for the translation of its address holds up those behind it, so the pages of a block are
  // touched a tile before its lines are asked for.
  void look_up_pages(const T* block) const {
    const int64_t bytes = static_cast<int64_t>(p.head_dim) * p.block_size * sizeof(T);
    for (int64_t at = 0; at < bytes && block; at += kPageBytes) ask(reinterpret_cast<const char*>(block) + at);
  }

  // Keys that are candidates, once for each query row that sees them; without a screen their K is read in full.
  void count_keys(const Item& item, int start, int tokens, Counts& counts) const {
    for (int row = 0; row < item.rows; ++row) {
      const int seen = std::clamp(s.rules[row * group].n - start, 0, tokens);
      counts.keys += seen, counts.candidates += seen;
    }
  }

  void screen(const Item& item, int tile, int asked_end, const Item* after) {
    turn_to(tile);
    if (p.screen.hard) {
      screen_tile<true>(item, tile, asked_end, after);
    } else {
      screen_tile<false>(item, tile, asked_end, after);
    }
  }

  // Approximate scores of a tile; lists candidates and asks for the rest of their codes.
  template <bool hard>
  void screen_tile(const Item& item, int tile, int asked_end, const Item* after) {
    // By value, so that stores of scores leave it in registers.
    const ScreenQueries q = s.screen;
    const int first = tile * p.blocks_per_screened_tile, last = std::min(first + p.blocks_per_screened_tile, blocks_of(p, item));
    const int end = std::min(asked_end * p.blocks_per_screened_tile, blocks_of(p, item));
    const int distance = std::max(1, kScreenAhead / p.block_size);
    const int stride = largest_tile(p);
    const int64_t group_bytes = ScreenBlock::group_bytes(q.dim);
    int count = 0;
    for (int block = first; block < last; ++block) {
      const ScreenBlock codes = screen_block(p, item.sequence, item.kv_head, block);
      const char* ahead = later_codes(item, block + distance, end, after);
      float* to = scores + (block - first) * p.block_size;
      uint32_t* marks_to = candidates + (block - first) * (p.block_size / kLanes);
      const int start = block * p.block_size, tokens = std::min(p.block_size, item.context - start);
      const int low = forced_below - start, high = forced_from - start;
      for (int t = 0; t < tokens; t += kLanes) {
        uint32_t marks = screen_group<hard>(q, codes.group(t / kLanes), p.softcap, to + t, stride, ahead);
        if (ahead) ahead += group_bytes;
        marks |= below(low - t) | ~below(high - t);
        marks &= below(tokens - t);
        marks_to[t / kLanes] = marks;
        const int known = count;
        count += list_lanes(marks, start + t, listed + count);
        // At once, for requests in bursts are dropped.
        for (int i = known; i < count; ++i) ask_plane_two(codes, listed[i] - start);
      }
      ends[block - first] = count;
    }
  }

  void ask_plane_two(const ScreenBlock& codes, int row) const {
    for (int byte = 0; byte < p.head_dim / 2; byte += kLineBytes) ask(codes.plane_two(row) + byte);
  }

  // As later_key, for plane one.
  const char* later_codes(const Item& item, int block, int end, const Item* after) const {
    if (block < end) return screen_block(p, item.sequence, item.kv_head, block).memory;
    const bool follows = after && after->screened && block - end < blocks_of(p, *after);
    return follows ? screen_block(p, after->sequence, after->kv_head, block - end).memory : nullptr;
  }

  // Scores of a screened tile's candidates by both planes.
  void refine(const Item& item, int tile, Counts& counts) {
    const ScreenQueries q = s.screen;
    const int first = tile * p.blocks_per_screened_tile, last = std::min(first + p.blocks_per_screened_tile, blocks_of(p, item));
    const int stride = largest_tile(p);
    int from = 0;
    for (int block = first; block < last; ++block) {
      const ScreenBlock codes = screen_block(p, item.sequence, item.kv_head, block);
      const int to = ends[block - first], start = block * p.block_size;
      refine_rows(q, codes, start, listed + from, to - from, s.fine + from, stride);
      from = to;
    }
    for (int m = 0; m < q.count && p.softcap > 0; ++m) {
      float* score = s.fine + m * stride;
      for (int i = 0; i < from; i += kLanes) store16(score + i, softcap16(load16(score + i), p.softcap));
    }
    for (int row = 0; row < item.rows; ++row) counts.candidates += listed_below(s.rules[row * group].n, from);
  }

  // Of `count` candidates those at positions below `limit`.
  int listed_below(int limit, int count) const {
    if (count == 0 || limit > listed[count - 1]) return count;
    return static_cast<int>(std::lower_bound(listed, listed + count, limit) - listed);
  }

  // What a row selects from that sees `seen` keys of the tile in turn.
  Keys all_keys(int row, int start, int seen) const {
    const KeepRule& rule = s.rules[row * group];
    return {start, nullptr, seen, seen, rule.low - start, rule.high - start, scores};
  }
  Keys candidates_of(int row, int start, int seen) const {
    const KeepRule& rule = s.rules[row * group];
    const int all = ends[(seen - 1) / p.block_size];
    const auto index = [&](int position) { return listed_below(position, all); };
    const int count = index(start + seen);
    return {0, listed, count, seen, std::min(index(rule.low), count), std::min(index(rule.high), count), s.fine};
  }

  // The keys of a row that are no candidates: into the sum of dropped probability by their approximate scores.
  void drop_rest(int row, int seen, Softmax& softmax) {
    in_register_tiles(group, [&](auto heads, int g) { drop<heads()>(row, row * group + g, seen, softmax); });
  }

  // This loop and those of `mark` and `weigh` are functions of their own, so that none competes with others for registers.
  template <int MT>
  [[gnu::noinline]] void drop(int row, int first, int seen, Softmax& softmax) {
    const int stride = largest_tile(p), words = (seen + kLanes - 1) / kLanes;
    const float* scores = this->scores + static_cast<int64_t>(first) * stride;
    // Twice where scores turn out to leave a reference behind: mostly in the first tile alone.
    for (bool raised = true; raised;) {
      Vec16 reference[MT], best[MT], sum[MT];
      TOPT_UNROLL
      for (int m = 0; m < MT; ++m) {
        reference[m] = Vec16(softmax.max[first + m]), best[m] = Vec16(-kInfinity);
        sum[m] = load16(softmax.dropped + (first + m) * kLanes);
      }
      for (int word = 0; word < words; ++word) {
        const uint32_t rest = ~candidates[word] & below(seen - word * kLanes);
        TOPT_UNROLL
        for (int m = 0; m < MT; ++m) {
          const Vec16 score = load16(scores + m * stride + word * kLanes);
          best[m] = max_lanes16(best[m], rest, score);
          sum[m] = add_lanes16(sum[m], rest, exp16(score - reference[m]));
        }
      }
      raised = false;
      for (int m = 0; m < MT; ++m) raised |= raise_to(row, first + m, max_lane16(best[m]), softmax);
      TOPT_UNROLL
      for (int m = 0; m < MT && !raised; ++m) store16(softmax.dropped + (first + m) * kLanes, sum[m]);
    }
  }

  // Keys of the tile that a row selects from.
  Keys keys_of(int row, int tile) const {
    const int size = tile_blocks(p, screened) * p.block_size, start = tile * size;
    const int seen = std::clamp(s.rules[row * group].n - start, 0, size);
    return screened ? candidates_of(row, start, seen) : all_keys(row, start, seen);
  }

  uint32_t* marks_of(int row) const { return s.marks + row * (largest_tile(p) / kLanes); }

  // Selection, softmax sums and survivors of a tile's scored keys, for the query rows of a list.
  void select(const Item& item, int first, int tile, Softmax& softmax, Counts& counts) {
    const int last = first + list_rows - 1;
    const Keys longest = keys_of(last, tile);
    if (longest.seen == 0) return;
    const int words = (longest.count + kLanes - 1) / kLanes;
    std::fill_n(s.read, words, 0u);
    for (int row = first; row <= last; ++row) {
      const Keys keys = row < last ? keys_of(row, tile) : longest;
      if (screened) drop_rest(row, keys.seen, softmax);
      uint32_t* marks = marks_of(row);
      std::fill_n(marks, words, 0u);
      in_register_tiles(group, [&](auto heads, int g) { mark<heads()>(item, row, g, keys, words, softmax, counts); });
      int read = 0;
      for (int word = 0; word < words; ++word) s.read[word] |= marks[word], read += std::popcount(marks[word]);
      counts.read += read;
      if (read < keys.seen) softmax.skipped[row] += 1;
    }
    const int pending = s.count[first];
    gather(item, first, longest, words);
    for (int row = first; row <= last; ++row) {
      in_register_tiles(group, [&](auto heads, int g) {
        // What scoring left of the next block to ask for.
        const Asks asks = row || g ? Asks() : remaining_asks(next_key, p.head_dim * p.block_size, words * heads());
        softmax.skipped[row] += weigh<heads()>(row, g, longest.scores, words, pending, asks, softmax);
      });
    }
  }

  // Scales the scores of MT heads from `g` on in place, marks what their rules keep, and raises their references. Scores of
  // keys that only later rows of the list see become -inf.
  template <int MT>
  [[gnu::noinline]] void mark(const Item& item, int row, int g, const Keys& keys, int words, Softmax& softmax, Counts& counts) {
    const int first = row * group + g, stride = largest_tile(p), count = keys.count;
    const KeepRule* rules = s.rules + first;
    uint32_t* marks = marks_of(row);
    float* scores = keys.scores + static_cast<int64_t>(first) * stride;
    bool forced = keys.low > 0 || keys.high < count;
    Vec16 best[MT];
    int reached[MT] = {};
    for (int m = 0; m < MT; ++m) {
      best[m] = Vec16(-kInfinity);
      forced |= rules[m].dense;
    }
    for (int t = 0; t < words * kLanes; t += kLanes) {
      const uint32_t valid = below(count - t);
      uint32_t read = marks[t / kLanes];
      TOPT_UNROLL
      for (int m = 0; m < MT; ++m) {
        float* at = scores + m * stride + t;
        Vec16 score = load16(at);
        if (!screened) score = score * Vec16(p.scale * p.key_scale);
        if (!screened && p.softcap > 0) score = softcap16(score, p.softcap);
        if (valid != 0xffff) score = select16(score, valid, -kInfinity);
        if (!screened || valid != 0xffff) store16(at, score);
        best[m] = max16(score, best[m]);
        uint32_t mask = valid;
        if (!dense) {
          mask = ge16(score, rules[m].theta);
          reached[m] += std::popcount(mask);
        }
        if (!dense && forced) {
          const int before = std::popcount(mask);
          mask |= rules[m].dense ? 0xffff : below(keys.low - t) | ~below(keys.high - t);
          mask &= valid;
          counts.kept += std::popcount(mask) - before;
        }
        if (!p.keep_union) s.kept[(first + m) * (stride / kLanes) + t / kLanes] = mask;
        read |= mask;
      }
      marks[t / kLanes] = read;
    }
    for (int m = 0; m < MT; ++m) {
      counts.kept += dense ? count : reached[m];
      if (p.reached && !rules[m].dense) count_reached(item.row + row, item.kv_head * group + g + m, reached[m]);
      raise_to(row, first + m, max_lane16(best[m]), softmax);
    }
  }

  // Raises a reference that scores leave behind, and says so; queued rows are added first, for their weights refer to it.
  bool raise_to(int row, int m, float largest, Softmax& softmax) {
    if (!(largest > softmax.max[m] + kMaxSlack)) return false;
    flush(row / list_rows * list_rows, softmax);
    raise(m, largest, softmax);
    return true;
  }

  // Threads may share a row.
  void count_reached(int row, int head, int count) const {
    int64_t& total = p.reached[static_cast<int64_t>(row) * p.num_heads + head];
    std::atomic_ref(total).fetch_add(count, std::memory_order_relaxed);
  }

  void raise(int m, float best, Softmax& softmax) {
    const float factor = std::exp(softmax.max[m] - best);
    softmax.max[m] = best;
    scale(softmax.used + m * kLanes, kLanes, factor);
    scale(softmax.dropped + m * kLanes, kLanes, factor);
    scale(softmax.acc + static_cast<int64_t>(m) * p.head_dim, p.head_dim, factor);
  }

  static void scale(float* values, int count, float factor) {
    for (int i = 0; i < count; i += kLanes) store16(values + i, load16(values + i) * Vec16(factor));
  }

  // Queues the V rows that some head keeps and asks for them, a line of each in turns, for requests in bursts to one
  // place are dropped. Where every row is kept, they are asked for as they are added.
  void gather(const Item& item, int list, const Keys& keys, int words) {
    const T** rows = s.rows + list * s.capacity(p);
    int pending = s.count[list];
    const int64_t stride = p.value_token_stride;
    // V of the positions of one block; they ascend, so that few need the division.
    const T* base = nullptr;
    int start = 0, end = 0;
    for (int word = 0; word < words; ++word) {
      for (uint32_t left = s.read[word]; left; left &= left - 1) {
        const int place = word * kLanes + std::countr_zero(left);
        const int position = keys.listed ? keys.listed[place] : keys.start + place;
        if (position >= end) {
          start = position / p.block_size * p.block_size, end = start + p.block_size;
          base = value_row<T>(p, item.sequence, item.kv_head, start);
        }
        rows[pending++] = base + (position - start) * stride;
      }
    }
    const int asked = dense ? std::min(pending, s.count[list] + kRowsAhead) : pending;
    for (int d = 0; d < p.head_dim; d += kLineBytes / static_cast<int>(sizeof(T))) {
      for (int i = s.count[list]; i < asked; ++i) ask(rows[i] + d);
    }
    s.count[list] = pending;
  }

  // Adds the exponentials of MT heads to their sums and writes the weights of the queued rows behind the `pending`
  // ones; returns whether a head drops a row that is read.
  template <int MT>
  [[gnu::noinline]] bool weigh(int row, int g, const float* of, int words, int pending, Asks asks, Softmax& softmax) {
    const int first = row * group + g, stride = largest_tile(p);
    const float* scores = of + static_cast<int64_t>(first) * stride;
    const uint32_t* marks = marks_of(row);
    float* weights = s.weights + first * s.capacity(p) + pending;
    Vec16 reference[MT], used_sum[MT], dropped_sum[MT];
    TOPT_UNROLL
    for (int m = 0; m < MT; ++m) {
      reference[m] = Vec16(softmax.max[first + m]);
      used_sum[m] = load16(softmax.used + (first + m) * kLanes);
      dropped_sum[m] = load16(softmax.dropped + (first + m) * kLanes);
    }
    bool drops = false;
    for (int word = 0; word < words; ++word) {
      const uint32_t read = s.read[word];
      TOPT_UNROLL
      for (int m = 0; m < MT; ++m) {
        asks.step();
        const uint32_t used = p.keep_union ? marks[word] : s.kept[(first + m) * (stride / kLanes) + word];
        drops |= used != marks[word];
        const Vec16 exponential = exp16(load16(scores + m * stride + word * kLanes) - reference[m]);
        split16(exponential, read, used, used_sum[m], dropped_sum[m], weights + m * s.capacity(p));
      }
      weights += std::popcount(read);
    }
    TOPT_UNROLL
    for (int m = 0; m < MT; ++m) {
      store16(softmax.used + (first + m) * kLanes, used_sum[m]);
      store16(softmax.dropped + (first + m) * kLanes, dropped_sum[m]);
    }
    return drops;
  }

  // Adds the rows of a list, which is named by its first query row.
  void flush(int list, Softmax& softmax) {
    const int m = list * group, vectors = list_rows * group, count = s.count[list];
    s.count[list] = 0;
    float* acc = softmax.acc + static_cast<int64_t>(m) * p.head_dim;
    const float* weights = s.weights + m * s.capacity(p);
    const T* const* rows = s.rows + list * s.capacity(p);
#if TOPT_AMX
    if constexpr (std::is_same_v<T, c10::BFloat16>) {
      if (tiled) {
        return accumulate_by_tiles(acc, vectors, p.head_dim, weights, s.capacity(p), rows, count, dense, s.tiles);
      }
    }
#endif
    accumulate(acc, vectors, p.head_dim, weights, s.capacity(p), rows, count, dense);
  }
};

// Adds `part` to `total`, both over the same item.
inline void merge(const Problem& p, int rows, const Softmax& part, Softmax& total) {
  const int group = p.group();
  for (int m = 0; m < rows * group; ++m) {
    const float reference = std::max(part.max[m], total.max[m]);
    const float ours = std::exp(total.max[m] - reference), theirs = std::exp(part.max[m] - reference);
    total.max[m] = reference;
    for (int i = m * kLanes; i < (m + 1) * kLanes; ++i) {
      total.used[i] = total.used[i] * ours + part.used[i] * theirs;
      total.dropped[i] = total.dropped[i] * ours + part.dropped[i] * theirs;
    }
    float* acc = total.acc + static_cast<int64_t>(m) * p.head_dim;
    const float* other = part.acc + static_cast<int64_t>(m) * p.head_dim;
    for (int d = 0; d < p.head_dim; ++d) acc[d] = acc[d] * ours + other[d] * theirs;
  }
  for (int row = 0; row < rows; ++row) total.skipped[row] += part.skipped[row];
}

// Sizes everything for a call; memory only grows, so a call in steady state allocates nothing.
template <typename T>
void prepare(const Problem& p, int threads, Shared& shared) {
  plan(p, threads, shared.schedule);
  const Schedule& schedule = shared.schedule;
  const auto units = static_cast<size_t>(schedule.units());
  auto grow = [](auto& memory, size_t size) {
    if (memory.size() < size) memory.resize(size);
  };
  grow(shared.slots, 2 * units * Softmax::size(p));
  grow(shared.scratch, threads * Scratch<T>::bytes(p) + 64);
  shared.counts.assign(units, Counts{});
  shared.dropped.assign(schedule.items.size(), 0.0);
  shared.next_units.assign(schedule.first_units.begin(), schedule.first_units.end() - 1);
}

// Merges an item that was divided, in the order of its segments, into the first one.
inline Softmax merge_segments(const Problem& p, Shared& shared, const Item& item) {
  const Schedule& schedule = shared.schedule;
  const int first = schedule.unit_of(item.first_tile), last = schedule.unit_of(item.first_tile + item.tiles - 1);
  auto softmax = [&](int unit) {
    return Softmax(p, item.rows, shared.slots.data() + schedule.slot(unit, item) * Softmax::size(p));
  };
  Softmax total = softmax(first);
  for (int unit = first + 1; unit <= last; ++unit) merge(p, item.rows, softmax(unit), total);
  return total;
}

// `part_end`: where on the line the part ends that the unit is of. Its worker goes on up to there.
template <typename T>
void run_unit(const Problem& p, Shared& shared, int unit, int64_t part_end, Scratch<T>& scratch) {
  Schedule& schedule = shared.schedule;
  int64_t at = schedule.unit_begins[unit];
  const int64_t end = schedule.unit_begins[unit + 1];
  auto after = std::upper_bound(schedule.items.begin(), schedule.items.end(), at,
                                [](int64_t tile, const Item& item) { return tile < item.first_tile; });
  const size_t first = after - schedule.items.begin() - 1;
  Decoder<T> decoder(p, scratch);
  for (size_t i = first; at < end; ++i) {
    const Item& item = schedule.items[i];
    const auto tile_at = [&](int64_t place) {
      return static_cast<int>(std::min<int64_t>(item.tiles, place - item.first_tile));
    };
    const int begin = tile_at(at), stop = tile_at(end);
    const bool whole = begin == 0 && stop == item.tiles;
    Softmax softmax(p, item.rows, whole ? scratch.softmax
                                        : shared.slots.data() + schedule.slot(unit, item) * Softmax::size(p));
    softmax.clear(p, item.rows);
    at = item.first_tile + stop;
    const Item* next = item.first_tile + item.tiles < part_end ? &schedule.items[i + 1] : nullptr;
    decoder.segment(item, begin, stop, tile_at(part_end), next, softmax, shared.counts[unit]);
    if (whole) {
      shared.dropped[i] = decoder.finish(item, softmax);
    } else if (std::atomic_ref(schedule.remaining[i]).fetch_sub(stop - begin) == stop - begin) {
      shared.dropped[i] = decoder.finish(item, merge_segments(p, shared, item));
    }
  }
}

// Takes the units of its own part in their order, then those that others have left.
template <typename T>
void run_worker(const Problem& p, Shared& shared, int worker) {
  auto base = reinterpret_cast<uintptr_t>(shared.scratch.data());
  Scratch<T> scratch(p, reinterpret_cast<char*>((base + 63) / 64 * 64) + worker * Scratch<T>::bytes(p));
  const Schedule& schedule = shared.schedule;
  for (int i = 0; i < schedule.workers(); ++i) {
    const int part = (worker + i) % schedule.workers(), end = schedule.first_units[part + 1];
    std::atomic_ref next(shared.next_units[part]);
    for (int unit; (unit = next.fetch_add(1)) < end;) run_unit(p, shared, unit, schedule.unit_begins[end], scratch);
  }
}

}  // namespace topt
