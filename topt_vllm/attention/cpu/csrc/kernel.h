// The kernel's entry points for one dtype of the cache: what binding.cpp calls and kernel.cpp builds.
#pragma once

#include "problem.h"
#include "schedule.h"
#include "screen_block.h"

namespace topt {

struct Kernels {
  void (*prepare)(const Problem& p, int threads, Shared& shared);
  void (*run)(const Problem& p, Shared& shared, int worker);
  // Writes the V sums of one KV head of a sequence that end in its rows [begin, end), which were written.
  void (*write_states)(const Problem& p, int sequence, int kv_head, int begin, int end);
  // Writes the copy of K of those among the 16 rows from 16 `index` on; `memory` is float32 [D, 16], scratch.
  void (*write_codes)(const Problem& p, int sequence, int kv_head, int index, int begin, int end, float* memory);
};

Kernels kernels_for(DType cache);

}  // namespace topt
