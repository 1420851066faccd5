// The kernel's entry points, one set for all dtypes of the cache: what binding.cpp calls and kernel.cpp builds.
#pragma once

#include "problem.h"
#include "schedule.h"
#include "screen_block.h"

namespace topt {

void prepare_call(const Problem& p, DType cache, int threads, Shared& shared);
void run_call(const Problem& p, DType cache, Shared& shared, int worker);

// Writes the V sums of one KV head of a sequence that end in its rows [begin, end), which were written.
void finish_states(const Problem& p, DType cache, int sequence, int kv_head, int begin, int end);

// Writes the copy of K of those among the 16 rows from 16 `index` on; `memory` is float32 [D, 16], scratch.
void finish_codes(const Problem& p, DType cache, int sequence, int kv_head, int index, int begin, int end,
                  float* memory);

}  // namespace topt
