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

}  // namespace topt
