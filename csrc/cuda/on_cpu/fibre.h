// A thread of CUDA's on a CPU: a fibre, which runs until it leaves and goes on from there.
#pragma once

#include <setjmp.h>
#include <ucontext.h>

#include <cstddef>
#include <utility>

#include "races.h"

namespace on_cpu {

// How `entry`, which must not return, begins on a stack of its own.
inline void prepare(ucontext_t& context, char* stack, size_t bytes, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = bytes;
  makecontext(&context, entry, 0);
}

#ifndef G2RL_RACES

// Fibres change places by jumps: swapcontext asks the kernel for signal masks each time, which takes longer than what
// most threads do in between.
class Fibre {
 public:
  void resume(char* stack, size_t bytes, void (*entry)()) {
    if (_setjmp(back_)) return;
    if (std::exchange(started_, true)) _longjmp(place_, 1);
    ucontext_t context;
    prepare(context, stack, bytes, entry);
    setcontext(&context);
  }
  void leave() {
    if (!_setjmp(place_)) _longjmp(back_, 1);
  }

 private:
  bool started_ = false;
  jmp_buf place_, back_;
};

#else

// ThreadSanitizer takes a jump for one on the same stack.
class Fibre {
 public:
  ~Fibre() {
    if (watched_) races::end(watched_);
  }
  void resume(char* stack, size_t bytes, void (*entry)()) {
    if (!watched_) {
      watched_ = races::new_fibre();
      prepare(place_, stack, bytes, entry);
    }
    resumer_ = races::this_fibre();
    races::switch_to(watched_);
    swapcontext(&back_, &place_);
  }
  void leave() {
    races::switch_to(resumer_);
    swapcontext(&place_, &back_);
  }

 private:
  ucontext_t place_, back_;
  void *watched_ = nullptr, *resumer_ = nullptr;
};

#endif

}  // namespace on_cpu
