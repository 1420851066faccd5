// The kernel's entry points, one set for all dtypes of the cache: what binding.cpp calls and kernel.cpp builds.
#pragma once

#include "problem.h"
#include "schedule.h"
#include "screen.h"

namespace topt {

void prepare_call(const Problem& p, DType cache, int threads, Shared& shared);
void run_call(const Problem& p, DType cache, Shared& shared, int worker);
void run_scalar(const Problem& p, DType cache, Counts& counts, double& dropped_mass);

// Fills the screen of one block of one KV head from its K.
void encode_screen_block(const Problem& p, DType cache, int64_t block, int kv_head);

// Sum of the 64-bit words of some memory.
int64_t sum_words(const char* memory, int64_t bytes);

}  // namespace topt
