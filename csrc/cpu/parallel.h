// Threads, by OpenMP.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <exception>
#include <numeric>
#include <thread>
#include <vector>

namespace g2rl {

// How many a call may use: what the calling thread's `Threads` says, or as many as OpenMP takes unasked.
int num_threads();

// Says so for the calls of this thread while it lives.
class Threads {
 public:
  explicit Threads(int count);
  ~Threads();
  Threads(const Threads&) = delete;
  Threads& operator=(const Threads&) = delete;

 private:
  int before_;
};

// Calls f() once on each of up to `count` threads; there may be fewer, of which the caller's is one.
template <typename F>
void on_threads(int64_t count, const F& f) {
  const int threads = num_threads();
  if (count <= 1 || threads <= 1) return f();
  std::atomic<int64_t> begun{0};
  std::atomic_flag failed = ATOMIC_FLAG_INIT;
  std::exception_ptr error;
  // As many whatever there is to do: OpenMP would end those that a smaller team leaves out, and start others later.
#pragma omp parallel num_threads(threads)
  {
    const Threads of_call(threads);  // each thread of OpenMP's has a number of its own
    try {
      if (begun++ < count) f();
    } catch (...) {
      if (!failed.test_and_set()) error = std::current_exception();
    }
  }
  if (error) std::rethrow_exception(error);
}

// Calls body(state, phase, task) for 0 <= task < tasks[phase] on several threads, each taking the next one: nothing a
// task computes may depend on the thread. make() builds a thread's own state.
//
// A phase begins when the tasks of those before have ended. It does not wait for threads without a task: where other
// processes have the processor, the end of each phase would take as long as they keep it.
template <typename Make, typename Body>
void share_phases(const std::vector<int64_t>& tasks, const Make& make, const Body& body) {
  constexpr int64_t kFailed = INT64_MAX / 2;
  constexpr int kSpins = 1 << 12;  // some microseconds, which most waits take
  std::vector<int64_t> first(tasks.size() + 1);
  std::partial_sum(tasks.begin(), tasks.end(), first.begin() + 1);
  std::atomic<int64_t> next{0}, ended{0};
  on_threads(tasks.empty() ? 0 : *std::max_element(tasks.begin(), tasks.end()), [&] {
    auto state = make();
    size_t phase = 0;
    for (int64_t task = next++; task < first.back(); task = next++) {
      while (task >= first[phase + 1]) ++phase;
      for (int spins = 0; ended.load() < first[phase]; ++spins)
        if (spins >= kSpins) std::this_thread::yield();
      if (ended.load() >= kFailed) return;
      try {
        body(state, phase, task - first[phase]);
      } catch (...) {
        ended = kFailed;  // nobody waits for this task
        throw;
      }
      ++ended;
    }
  });
}

// Calls f(first, last) with shares of begin..end, of `least` at least but for one, on several threads.
template <typename F>
void parallel_for(int64_t begin, int64_t end, int64_t least, const F& f) {
  const int64_t n = end - begin, shares = std::min<int64_t>(num_threads(), (n + least - 1) / least);
  share_phases(
      {shares}, [] { return 0; },
      [&](int, size_t, int64_t i) { f(begin + n * i / shares, begin + n * (i + 1) / shares); });
}

}  // namespace g2rl
