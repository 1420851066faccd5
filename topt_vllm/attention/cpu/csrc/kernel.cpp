// Instantiates the kernel for the dtypes of the cache.
#include "kernel.h"

#include "decode.h"
#include "scalar.h"

namespace topt {

template <typename Visitor>
static void with_dtype(DType cache, Visitor visit) {
  switch (cache) {
    case DType::kBFloat16: return visit(c10::BFloat16());
    case DType::kHalf: return visit(c10::Half());
    default: return visit(float());
  }
}

void prepare_call(const Problem& p, DType cache, int threads, Shared& shared) {
  with_dtype(cache, [&](auto element) { prepare<decltype(element)>(p, threads, shared); });
}

void run_call(const Problem& p, DType cache, Shared& shared, int worker) {
  with_dtype(cache, [&](auto element) { run_worker<decltype(element)>(p, shared, worker); });
}

void run_scalar(const Problem& p, DType cache, Counts& counts, double& dropped_mass) {
  with_dtype(cache, [&](auto element) { decode_scalar<decltype(element)>(p, counts, dropped_mass); });
}

}  // namespace topt
