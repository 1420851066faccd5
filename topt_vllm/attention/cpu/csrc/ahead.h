// Asking memory for what is read next, in small parts between the work on what is there: requests in bursts are dropped
// (README.md has the measurement).
#pragma once

#include <cstdint>

namespace topt {

constexpr int kLineBytes = 64, kPageBytes = 4096;

// Into the second cache; requests for the first wait for its few miss buffers.
// GCC 12 takes __builtin_prefetch out of loops where another one stands nearby, so the instruction is named.
inline void ask(const void* line) {
#if defined(__x86_64__)
  asm volatile("prefetcht1 (%0)" : : "r"(line));
#else
  __builtin_prefetch(line, 0, 2);
#endif
}

// Memory that is asked for evenly: at every step the lines that begin in the bytes due by then.
struct Asks {
  const char* at = nullptr;
  const char* due = nullptr;
  int bytes = 0;  // a step

  Asks() = default;
  explicit Asks(const void* begin, int64_t bytes = 0)
      : at(static_cast<const char*>(begin)), due(at), bytes(static_cast<int>(bytes)) {}

  void step() {
    for (due += bytes; at < due; at += kLineBytes) ask(at);
  }
};

// While a block is scored, three quarters of the block to come are asked for, and the rest while survivors are weighed:
// about the share of the time that each takes.
constexpr double kScoreShare = 0.75;

// The rest of a block of `size` elements, in equal parts for `steps` steps; none for a null block.
template <typename T>
Asks remaining_asks(const T* block, int64_t size, int steps) {
  if (!block) return {};
  const auto bytes = static_cast<int64_t>(size * sizeof(T) * kScoreShare);
  const int64_t left = size * sizeof(T) - bytes;
  return Asks(reinterpret_cast<const char*>(block) + bytes, (left + steps - 1) / steps);
}

}  // namespace topt
