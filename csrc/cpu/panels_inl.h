#pragma once

#include <atomic>

#include "parallel.h"

#if defined(__SSE__)
#include <xmmintrin.h>
#endif

namespace g2rl {

// Subnormal products cost a trap to microcode each, and mean nothing next to sums of order one.
class FlushSubnormals {
 public:
#if defined(__SSE__)
  FlushSubnormals() : saved_(_mm_getcsr()) { _mm_setcsr(saved_ | 0x8040); }
  ~FlushSubnormals() { _mm_setcsr(saved_); }

 private:
  unsigned saved_;
#endif
};

template <typename Make, typename Body>
void for_tasks(int64_t tasks, const Make& make, const Body& body) {
  std::atomic<int64_t> next{0};
  on_threads(tasks, [&] {
    [[maybe_unused]] FlushSubnormals flush;  // does nothing without SSE
    auto state = make();
    rowwise().enter();
    for (int64_t task = next++; task < tasks; task = next++) body(state, task);
    rowwise().leave();
  });
}

}  // namespace g2rl
