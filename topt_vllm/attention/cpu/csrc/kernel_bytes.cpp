// Instantiates the kernel for caches of one byte an element.
#include "decode.h"
#include "scalar.h"

namespace topt {

template void run_worker<E4M3>(const Problem&, Shared&, int);
template void run_worker<E5M2>(const Problem&, Shared&, int);
template void decode_scalar<E4M3>(const Problem&, Counts&, double&);
template void decode_scalar<E5M2>(const Problem&, Counts&, double&);

}  // namespace topt
