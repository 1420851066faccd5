// Instantiates the kernel for caches of one byte an element.
#include "decode.h"

namespace topt {

template void run_worker<E4M3>(const Problem&, Shared&, int);
template void run_worker<E5M2>(const Problem&, Shared&, int);

}  // namespace topt
