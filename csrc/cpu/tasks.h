// Tasks that call the functions in rowwise.h, on several threads.
#pragma once

#include "parallel.h"
#include "rowwise.h"

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

// A thread that may multiply while this lives. It is left as it was, also by a task that throws.
class KernelThread {
 public:
  KernelThread() { rowwise().enter(); }
  ~KernelThread() { rowwise().leave(); }
  KernelThread(const KernelThread&) = delete;
  KernelThread& operator=(const KernelThread&) = delete;

 private:
  [[maybe_unused]] FlushSubnormals flush_;  // does nothing without SSE
};

// `share_phases` on such threads.
template <typename Make, typename Body>
void for_phases(const std::vector<int64_t>& tasks, const Make& make, const Body& body) {
  struct Thread {
    KernelThread ready;
    decltype(make()) state;
  };
  share_phases(
      tasks, [&] { return Thread{KernelThread(), make()}; },
      [&](Thread& thread, size_t phase, int64_t task) { body(thread.state, phase, task); });
}

// The same for one phase: body(state, task).
template <typename Make, typename Body>
void for_tasks(int64_t tasks, const Make& make, const Body& body) {
  for_phases({tasks}, make, [&](auto& state, size_t, int64_t task) { body(state, task); });
}

}  // namespace g2rl
