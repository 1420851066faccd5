// Instantiates the kernel for the dtypes of the cache.
#include "kernel.h"

#include "decode.h"
#include "encode.h"
#include "sums.h"

namespace topt {

// In kernel_bytes.cpp, which is compiled beside this file.
extern template void run_worker<E4M3>(const Problem&, Shared&, int);
extern template void run_worker<E5M2>(const Problem&, Shared&, int);

void prepare_call(const Problem& p, DType cache, int threads, Shared& shared) {
  with_stored(cache, [&](auto element) { prepare<decltype(element)>(p, threads, shared); });
}

void run_call(const Problem& p, DType cache, Shared& shared, int worker) {
  with_stored(cache, [&](auto element) { run_worker<decltype(element)>(p, shared, worker); });
}

void finish_states(const Problem& p, DType cache, int sequence, int kv_head, int begin, int end) {
  with_stored(cache, [&](auto element) { write_states<decltype(element)>(p, sequence, kv_head, begin, end); });
}

void finish_codes(const Problem& p, DType cache, int sequence, int kv_head, int index, int begin, int end,
                  float* memory) {
  with_stored(cache, [&](auto element) {
    write_codes<decltype(element)>(p, sequence, kv_head, index, begin, end, memory);
  });
}

int64_t sum_words(const char* memory, int64_t bytes) {
  // Four streams, for one alone leaves load buffers idle.
  int64_t sum[4][8] = {};
  const int64_t part = bytes / 4 / 64 * 64;
  for (int64_t at = 0; at < part; at += 64) {
    for (int stream = 0; stream < 4; ++stream) {
      int64_t words[8];
      __builtin_memcpy(words, memory + stream * part + at, 64);
      for (int i = 0; i < 8; ++i) sum[stream][i] += words[i];
    }
  }
  int64_t total = 0;
  for (const auto& lanes : sum) {
    for (const int64_t lane : lanes) total += lane;
  }
  return total;
}

}  // namespace topt
