// The kernel's entry points, one set for all dtypes of the cache: what binding.cpp calls and kernel.cpp builds.
#pragma once

#include "problem.h"
#include "schedule.h"
#include "screen.h"

namespace topt {

void prepare_call(const Problem& p, DType cache, int threads, Shared& shared);
void run_call(const Problem& p, DType cache, Shared& shared, int worker);
void run_scalar(const Problem& p, DType cache, Counts& counts, double& dropped_mass);

// Brings the V sums and the screen of one KV head of a sequence up to date whose rows [begin, end) were written.
void finish_rows(const Problem& p, DType cache, int sequence, int kv_head, int begin, int end);

// Sum of the 64-bit words of some memory.
int64_t sum_words(const char* memory, int64_t bytes);

}  // namespace topt
