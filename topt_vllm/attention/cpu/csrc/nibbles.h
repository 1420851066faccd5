// Integer products of packed codes with query vectors, with what vector instructions there are; all give the same sums.
#pragma once

#include "vector.h"

#if TOPT_AVX512 && defined(__AVX512VNNI__)
#include "nibbles_vnni.h"
#elif defined(__AVX2__)
#include "nibbles_avx2.h"
#else
#include "nibbles_portable.h"
#endif
