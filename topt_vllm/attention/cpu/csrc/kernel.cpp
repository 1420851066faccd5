// Instantiates the kernel for the dtypes of the cache.
#include "kernel.h"

#include "decode.h"
#include "encode.h"
#include "sums.h"

namespace topt {

// In kernel_bytes.cpp, which is compiled beside this file.
extern template void run_worker<E4M3>(const Problem&, Shared&, int);
extern template void run_worker<E5M2>(const Problem&, Shared&, int);

Kernels kernels_for(DType cache) {
  return with_stored(cache, [](auto element) {
    using T = decltype(element);
    return Kernels{prepare<T>, run_worker<T>, write_states<T>, write_codes<T>};
  });
}

}  // namespace topt
