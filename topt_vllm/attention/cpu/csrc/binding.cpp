// torch.ops.topt.decode: checks, raw pointers and threads around the kernel.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <optional>
#include <vector>

#include "amx_layout.h"
#include "kernel.h"

#ifndef TOPT_LIBRARY
#error "TOPT_LIBRARY names the operator library; jit.py sets it"
#endif

namespace {

using at::Tensor;
using std::optional;

topt::DType dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case at::kBFloat16: return topt::DType::kBFloat16;
    case at::kHalf: return topt::DType::kHalf;
    case at::kFloat: return topt::DType::kFloat;
    default: TORCH_CHECK(false, name, ": expected bfloat16, float16 or float32, got ", t.scalar_type());
  }
}

// What K or V holds.
topt::DType stored_dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case at::kFloat8_e4m3fn: return topt::DType::kE4M3;
    case at::kFloat8_e5m2: return topt::DType::kE5M2;
    default: return dtype_of(t, name);
  }
}

void check(const Tensor& t, const char* name, int64_t dims, at::ScalarType dtype) {
  TORCH_CHECK(t.dim() == dims, name, ": expected ", dims, " dimensions, got shape ", t.sizes());
  TORCH_CHECK(t.scalar_type() == dtype, name, ": expected ", dtype, ", got ", t.scalar_type());
  TORCH_CHECK(dims == 0 || t.size(-1) == 0 || t.stride(-1) == 1, name, ": expected a contiguous last dimension, got strides ",
              t.strides());
  TORCH_CHECK(t.device().is_cpu(), name, ": expected a CPU tensor, got ", t.device());
}

topt::Rows rows_of(const Tensor& t, const char* name) {
  TORCH_CHECK(t.dim() == 3 && t.device().is_cpu(), name, ": expected a CPU tensor [R, H, D], got ", t.sizes(), " on ",
              t.device());
  return {t.data_ptr(), dtype_of(t, name), t.stride(0), t.stride(1), t.stride(2)};
}

// Data of a contiguous argument of that shape, of T.
template <typename T>
T* data_of(const Tensor& t, const char* name, at::IntArrayRef shape) {
  check(t, name, static_cast<int64_t>(shape.size()), c10::CppTypeToScalarType<T>::value);
  TORCH_CHECK(t.is_contiguous() && t.sizes() == shape, name, ": expected contiguous ", shape, ", got ", t.sizes());
  return t.data_ptr<T>();
}

void set_screen(topt::Problem& p, const optional<Tensor>& codes, const optional<Tensor>& mean,
                const optional<Tensor>& scale, const optional<Tensor>& signs) {
  if (!codes) return;
  const int64_t bytes = topt::ScreenBlock::bytes(p.head_dim, p.block_size);
  check(*codes, "key_screen", 3, at::kByte);
  TORCH_CHECK(codes->size(0) == p.num_blocks && codes->size(1) == p.num_kv_heads && codes->size(2) == bytes &&
                  codes->stride(1) == bytes,
              "key_screen: expected [", p.num_blocks, ", ", p.num_kv_heads, ", ", bytes,
              "] bytes, contiguous in a block, got ", codes->sizes());
  TORCH_CHECK(mean && scale && signs, "key_screen: expected mean, scale and signs with the codes, got none");
  p.screen.codes = reinterpret_cast<char*>(codes->data_ptr<uint8_t>());
  p.screen.block_stride = codes->stride(0);
  p.screen.mean = data_of<float>(*mean, "key_screen.mean", {p.num_kv_heads, p.head_dim});
  p.screen.scale = data_of<float>(*scale, "key_screen.scale", {p.num_kv_heads, p.head_dim});
  p.screen.signs = data_of<float>(*signs, "key_screen.signs", {p.head_dim});
}

void set_key(topt::Problem& p, const Tensor& key) {
  TORCH_CHECK(key.dim() == 4, "key: expected [B, Hkv, P, D], got ", key.sizes());
  TORCH_CHECK(key.stride(2) == 1, "key: expected blocks stored [D, P], so stride(2) == 1, got strides ", key.strides());
  p.head_dim = static_cast<int>(key.size(3));
  p.block_size = static_cast<int>(key.size(2));
  p.num_kv_heads = static_cast<int>(key.size(1));
  p.num_blocks = key.size(0);
  TORCH_CHECK(p.num_kv_heads > 0, "key: expected one KV head at least, got ", key.sizes());
  TORCH_CHECK(p.head_dim % 16 == 0 && p.head_dim >= 16, "key: expected a head dimension that is a multiple of 16, got ",
              p.head_dim);
  TORCH_CHECK(p.block_size % 16 == 0 && p.block_size >= 16, "key: expected a block size that is a multiple of 16, got ",
              p.block_size);
  p.key = key.const_data_ptr();
  p.key_block_stride = key.stride(0), p.key_head_stride = key.stride(1), p.key_dim_stride = key.stride(3);
}

void set_sums(topt::Problem& p, const optional<Tensor>& value_sums) {
  p.state_rows = p.block_size;
  if (!value_sums) return;
  check(*value_sums, "value_sums", 4, at::kFloat);
  const int64_t states = value_sums->size(2);
  TORCH_CHECK(states > 0 && p.block_size % states == 0 && value_sums->size(0) == p.num_blocks &&
                  value_sums->size(1) == p.num_kv_heads && value_sums->size(3) == p.head_dim,
              "value_sums: expected [B, Hkv, P / T, D] with B = ", p.num_blocks, ", Hkv = ", p.num_kv_heads, ", P = ",
              p.block_size, ", D = ", p.head_dim, ", got ", value_sums->sizes());
  p.state_rows = static_cast<int>(p.block_size / states);
  p.value_sums = value_sums->data_ptr<float>();
  p.sums_block_stride = value_sums->stride(0), p.sums_head_stride = value_sums->stride(1);
  p.sums_state_stride = value_sums->stride(2);
}

void set_cache(topt::Problem& p, const Tensor& key, const Tensor& value, const optional<Tensor>& value_sums) {
  set_key(p, key);
  TORCH_CHECK(key.sizes() == value.sizes(), "value: expected the shape of key, ", key.sizes(), ", got ", value.sizes());
  TORCH_CHECK(key.scalar_type() == value.scalar_type(), "value: expected the dtype of key, ", key.scalar_type(),
              ", got ", value.scalar_type());
  TORCH_CHECK(value.stride(3) == 1, "value: expected blocks stored [P, D], so stride(3) == 1, got strides ",
              value.strides());
  p.blocks_per_tile = topt::choose_blocks_per_tile(p.head_dim, p.block_size, static_cast<int>(key.element_size()));
  p.value = value.const_data_ptr();
  p.value_block_stride = value.stride(0), p.value_head_stride = value.stride(1);
  p.value_token_stride = value.stride(2);
  set_sums(p, value_sums);
}

float scale_of(const optional<Tensor>& scale, const char* name) {
  if (!scale) return 1.0f;
  TORCH_CHECK(scale->scalar_type() == at::kFloat && scale->numel() == 1 && scale->device().is_cpu(), name,
              ": expected one float32 on the CPU, got ", scale->scalar_type(), " ", scale->sizes());
  return *scale->const_data_ptr<float>();
}

void set_batch(topt::Problem& p, const Tensor& starts, const Tensor& seq_lens, const Tensor& block_table) {
  check(starts, "query_start_loc", 1, at::kInt);
  check(seq_lens, "seq_lens", 1, at::kInt);
  check(block_table, "block_table", 2, at::kInt);
  TORCH_CHECK(starts.size(0) == seq_lens.size(0) + 1 && block_table.size(0) >= seq_lens.size(0),
              "query_start_loc, seq_lens, block_table: expected S + 1, S and S rows, got ", starts.size(0), ", ",
              seq_lens.size(0), " and ", block_table.size(0));
  p.query_start_loc = starts.const_data_ptr<int32_t>();
  p.seq_lens = seq_lens.const_data_ptr<int32_t>();
  p.block_table = block_table.const_data_ptr<int32_t>();
  p.block_table_stride = block_table.stride(0);
  p.num_sequences = static_cast<int>(seq_lens.size(0));
  for (int i = 0; i < p.num_sequences; ++i) {
    TORCH_CHECK(p.query_start_loc[i] <= p.query_start_loc[i + 1], "query_start_loc: expected ascending rows, got ",
                p.query_start_loc[i], " before ", p.query_start_loc[i + 1]);
    const bool empty = p.query_start_loc[i] == p.query_start_loc[i + 1];
    TORCH_CHECK(empty || p.seq_lens[i] <= block_table.size(1) * p.block_size, "seq_lens: expected at most ",
                block_table.size(1) * p.block_size, " tokens, which the block table holds, got ", p.seq_lens[i]);
  }
}

void set_thetas(topt::Problem& p, const Tensor& query, const optional<Tensor>& lengths, const optional<Tensor>& theta,
                const optional<Tensor>& law, const optional<Tensor>& row_theta) {
  if (!lengths && !row_theta) return;
  TORCH_CHECK(!p.vmean || p.value_sums, "value_sums: expected a tensor with vmean, got none");
  if (row_theta) {
    TORCH_CHECK(!lengths, "row_theta: expected none beside lengths, theta and law");
    p.row_theta = data_of<float>(*row_theta, "row_theta", {query.size(0), p.num_heads});
    return;
  }
  TORCH_CHECK(theta && law, "theta, law: expected with lengths, got none");
  TORCH_CHECK(lengths->numel() > 0, "lengths: expected one at least, got none");
  p.lengths = data_of<int32_t>(*lengths, "lengths", {lengths->numel()});
  p.num_lengths = static_cast<int>(lengths->numel());
  p.theta = data_of<float>(*theta, "theta", {p.num_heads, p.num_lengths});
  p.law = data_of<float>(*law, "law", {p.num_heads, 2});
}

void run(const topt::Problem& p, const topt::Kernels& kernels, topt::Counts& counts, double& dropped) {
  // One workspace per calling thread; it grows to the largest call and stays.
  static thread_local topt::Shared shared;
  kernels.prepare(p, at::get_num_threads(), shared);
  const int workers = shared.schedule.workers();
  // The lambda runs on other threads, whose own thread_local it must not name.
  topt::Shared* call = &shared;
  at::parallel_for(0, workers, 1, [&p, call, &kernels](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker) kernels.run(p, *call, static_cast<int>(worker));
  });
  for (const topt::Counts& unit : shared.counts) counts.kept += unit.kept, counts.read += unit.read, counts.keys += unit.keys, counts.candidates += unit.candidates;
  for (const double item : shared.dropped) dropped += item;
}

void add_statistics(const topt::Problem& p, const topt::Counts& counts, double dropped, const Tensor& statistics) {
  TORCH_CHECK(statistics.scalar_type() == at::kDouble && statistics.is_contiguous() && statistics.dim() == 2 &&
                  statistics.size(0) > 0 && statistics.size(1) == 8,
              "statistics: expected float64 [slots, 8], got ", statistics.scalar_type(), " ", statistics.sizes());
  double rows = 0, tokens = 0;
  for (int sequence = 0; sequence < p.num_sequences; ++sequence) {
    for (int row = p.query_start_loc[sequence]; row < p.query_start_loc[sequence + 1]; ++row) {
      rows += 1;
      tokens += std::max(0, topt::row_length(p, sequence, row));
    }
  }
  // The order of common.Stat.
  const double added[] = {rows, tokens * p.num_heads, static_cast<double>(counts.kept), tokens * p.num_kv_heads,
                          static_cast<double>(counts.read), dropped, static_cast<double>(counts.keys),
                          static_cast<double>(counts.candidates)};
  double* target = statistics.data_ptr<double>();
  for (int i = 0; i < 8; ++i) target[i] += added[i];
}

void decode(const Tensor& query, const Tensor& key, const Tensor& value, const optional<Tensor>& value_sums,
            const Tensor& query_start_loc, const Tensor& seq_lens, const Tensor& block_table,
            const optional<Tensor>& lengths, const optional<Tensor>& theta, const optional<Tensor>& law,
            const optional<Tensor>& row_theta, int64_t min_seq_len, int64_t sink_tokens, int64_t recent_tokens,
            bool keep_union, bool vmean, double scale, double softcap, Tensor out, const optional<Tensor>& statistics,
            const optional<Tensor>& screen_codes, const optional<Tensor>& screen_mean,
            const optional<Tensor>& screen_scale, const optional<Tensor>& screen_signs, optional<double> screen_margin,
            int64_t screen_min_seq_len, const optional<Tensor>& reached, const optional<Tensor>& sinks,
            const optional<Tensor>& key_scale, const optional<Tensor>& value_scale) {
  topt::Problem p{};
  p.query = rows_of(query, "query");
  p.out = rows_of(out, "out");
  TORCH_CHECK(out.sizes() == query.sizes(), "out: expected the shape of query, ", query.sizes(), ", got ", out.sizes());
  p.num_heads = static_cast<int>(query.size(1));
  p.vmean = vmean;
  p.keep_union = keep_union;
  set_cache(p, key, value, value_sums);
  const topt::Kernels kernels = topt::kernels_for(stored_dtype_of(key, "key"));
  set_screen(p, screen_codes, screen_mean, screen_scale, screen_signs);
  p.screen.hard = !screen_margin;
  p.screen.min_seq_len = static_cast<int>(screen_min_seq_len);
  p.screen.margin = static_cast<float>(screen_margin.value_or(0));
  TORCH_CHECK(query.size(2) == p.head_dim && p.num_heads % p.num_kv_heads == 0, "query: expected [R, multiple of ",
              p.num_kv_heads, ", ", p.head_dim, "], got ", query.sizes());
  set_batch(p, query_start_loc, seq_lens, block_table);
  TORCH_CHECK(p.query_start_loc[0] >= 0 && p.query_start_loc[p.num_sequences] <= query.size(0),
              "query_start_loc: expected rows up to ", query.size(0), ", got ", p.query_start_loc[p.num_sequences]);
  set_thetas(p, query, lengths, theta, law, row_theta);
  if (sinks) p.sinks = data_of<float>(*sinks, "sinks", {p.num_heads});
  p.min_seq_len = static_cast<int>(std::min<int64_t>(min_seq_len, INT32_MAX));
  p.sink_tokens = static_cast<int>(std::min<int64_t>(sink_tokens, INT32_MAX / 2));
  p.recent_tokens = static_cast<int>(std::min<int64_t>(recent_tokens, INT32_MAX / 2));
  p.scale = static_cast<float>(scale);
  p.key_scale = scale_of(key_scale, "key_scale");
  p.value_scale = scale_of(value_scale, "value_scale");
  p.softcap = static_cast<float>(softcap);
  if (p.query_start_loc[p.num_sequences] == p.query_start_loc[0]) return;
  p.blocks_per_screened_tile = p.screen.codes ? topt::choose_screened_blocks(p, at::get_num_threads()) : 0;
  topt::Counts counts;
  if (reached) p.reached = data_of<int64_t>(*reached, "reached", {query.size(0), p.num_heads});
  double dropped = 0;
  run(p, kernels, counts, dropped);
  if (statistics) add_statistics(p, counts, dropped, *statistics);
}

int64_t screen_bytes(int64_t head_dim, int64_t block_size) {
  return topt::ScreenBlock::bytes(static_cast<int>(head_dim), static_cast<int>(block_size));
}

// A state ends wherever a block does. Most decode steps end none, and need no threads.
void write_ending_states(const topt::Problem& p, const topt::Kernels& kernels) {
  std::vector<int> ending;
  for (int sequence = 0; sequence < p.num_sequences; ++sequence) {
    const int end = p.seq_lens[sequence];
    if (topt::first_written(p, sequence) / p.state_rows < end / p.state_rows) ending.push_back(sequence);
  }
  at::parallel_for(0, static_cast<int64_t>(ending.size()) * p.num_kv_heads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int sequence = ending[i / p.num_kv_heads];
      kernels.write_states(p, sequence, static_cast<int>(i % p.num_kv_heads), topt::first_written(p, sequence),
                           p.seq_lens[sequence]);
    }
  });
}

// Groups of 16 rows are independent, so threads share those of all sequences.
void write_all_codes(topt::Problem& p, const topt::Kernels& kernels) {
  std::vector<float> factor(static_cast<size_t>(p.num_kv_heads) * p.head_dim);
  for (size_t i = 0; i < factor.size(); ++i) factor[i] = p.screen.signs[i % p.head_dim] * (1.0f / p.screen.scale[i]);
  p.screen.factor = factor.data();
  std::vector<std::pair<int, int>> groups;  // (sequence, group of 16 rows)
  for (int sequence = 0; sequence < p.num_sequences; ++sequence) {
    const int begin = topt::first_written(p, sequence), end = p.seq_lens[sequence];
    for (int row = begin / topt::kLanes * topt::kLanes; row < end && begin < end; row += topt::kLanes) {
      groups.emplace_back(sequence, row / topt::kLanes);
    }
  }
  at::parallel_for(0, static_cast<int64_t>(groups.size()) * p.num_kv_heads, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> memory(topt::kLanes * p.head_dim);
    for (int64_t i = begin; i < end; ++i) {
      const auto [sequence, index] = groups[i / p.num_kv_heads];
      kernels.write_codes(p, sequence, static_cast<int>(i % p.num_kv_heads), index, topt::first_written(p, sequence),
                          p.seq_lens[sequence], memory.data());
    }
  });
}

// Brings V sums and the copy of K up to date after the rows of a batch were written.
void finish(const Tensor& key, const Tensor& value, optional<Tensor> value_sums, optional<Tensor> screen_codes,
            const optional<Tensor>& screen_mean, const optional<Tensor>& screen_scale,
            const optional<Tensor>& screen_signs, const Tensor& query_start_loc, const Tensor& seq_lens,
            const Tensor& block_table, const optional<Tensor>& key_scale) {
  topt::Problem p{};
  set_cache(p, key, value, value_sums);
  const topt::Kernels kernels = topt::kernels_for(stored_dtype_of(key, "key"));
  set_screen(p, screen_codes, screen_mean, screen_scale, screen_signs);
  set_batch(p, query_start_loc, seq_lens, block_table);
  p.key_scale = scale_of(key_scale, "key_scale");
  if (p.value_sums) write_ending_states(p, kernels);
  if (p.screen.codes) write_all_codes(p, kernels);
}

// Copies blocks of K and V as vLLM's AMX kernels read them.
void copy_to_amx(const Tensor& key, const Tensor& value, const Tensor& blocks, const Tensor& copy) {
  topt::Problem p{};
  set_cache(p, key, value, std::nullopt);
  TORCH_CHECK(key.element_size() <= 2, "key: expected elements of 16 or 8 bits, got ", key.scalar_type());
  check(blocks, "blocks", 1, at::kLong);
  TORCH_CHECK(blocks.is_contiguous(), "blocks: expected a contiguous tensor, got strides ", blocks.strides());
  const int64_t size = 2 * static_cast<int64_t>(p.block_size) * p.head_dim, heads = p.num_kv_heads;
  TORCH_CHECK(copy.scalar_type() == key.scalar_type() && copy.is_contiguous() && copy.device().is_cpu() &&
                  copy.numel() == blocks.size(0) * heads * size,
              "copy: expected ", blocks.size(0) * heads * size, " contiguous elements of ", key.scalar_type(), ", got ",
              copy.sizes(), " of ", copy.scalar_type());
  const auto* ids = blocks.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < blocks.size(0); ++i) {
    TORCH_CHECK(ids[i] >= 0 && ids[i] < key.size(0), "blocks: expected 0 to ", key.size(0) - 1, ", got ", ids[i]);
  }
  const auto copy_as = [&](auto* target) {
    at::parallel_for(0, blocks.size(0) * heads, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        topt::copy_to_amx(p, ids[i / heads], static_cast<int>(i % heads), target + i * size);
      }
    });
  };
  if (key.element_size() == 2) {
    copy_as(static_cast<uint16_t*>(copy.data_ptr()));
  } else {
    copy_as(static_cast<uint8_t*>(copy.data_ptr()));
  }
}

}  // namespace

// The library's name carries the build key, so that two builds can live in one process. TORCH_LIBRARY quotes its
// argument before macros in it are expanded.
#define TOPT_REGISTER(name, m) TORCH_LIBRARY(name, m)
TOPT_REGISTER(TOPT_LIBRARY, m) {
  m.def(
      "decode(Tensor query, Tensor key, Tensor value, Tensor? value_sums, Tensor query_start_loc, Tensor seq_lens, "
      "Tensor block_table, Tensor? lengths, Tensor? theta, Tensor? law, Tensor? row_theta, int min_seq_len, "
      "int sink_tokens, int recent_tokens, bool keep_union, bool vmean, float scale, float softcap, Tensor(a!) out, "
      "Tensor(b!)? statistics, Tensor? screen_codes, Tensor? screen_mean, Tensor? screen_scale, "
      "Tensor? screen_signs, float? screen_margin, int screen_min_seq_len, Tensor(c!)? reached, Tensor? sinks, "
      "Tensor? key_scale, Tensor? value_scale) -> ()");
  m.def("screen_bytes(int head_dim, int block_size) -> int", screen_bytes);
  m.def(
      "finish(Tensor key, Tensor value, Tensor(a!)? value_sums, Tensor(b!)? screen_codes, Tensor? screen_mean, "
      "Tensor? screen_scale, Tensor? screen_signs, Tensor query_start_loc, Tensor seq_lens, Tensor block_table, "
      "Tensor? key_scale) -> ()");
  m.impl("finish", c10::DispatchKey::CPU, TORCH_FN(finish));
  m.def("copy_to_amx(Tensor key, Tensor value, Tensor blocks, Tensor(a!) copy) -> ()");
  m.impl("copy_to_amx", c10::DispatchKey::CPU, TORCH_FN(copy_to_amx));
  m.impl("decode", c10::DispatchKey::CPU, TORCH_FN(decode));
}
