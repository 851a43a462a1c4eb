// What Clang's ThreadSanitizer is told of the fibres of on_cpu.h, so that it finds accesses to memory, shared or
// global, that nothing in CUDA's model orders: only barriers of any kind, `__syncwarp` and launches do. Without it,
// nothing.
//
// Not watched: on_cpu.h itself and what stands in for a chip's units (races.txt), the memory between TMA and wgmma.
// https://github.com/llvm/llvm-project/blob/main/compiler-rt/include/sanitizer/tsan_interface.h
#pragma once

#ifdef __has_feature
#if __has_feature(thread_sanitizer)
#define G2RL_RACES
#endif
#endif

#ifdef G2RL_RACES
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned);
void __tsan_destroy_fiber(void*);
void __tsan_switch_to_fiber(void*, unsigned);
void __tsan_acquire(void*);
void __tsan_release(void*);
void AnnotateIgnoreReadsBegin(const char*, int);
void AnnotateIgnoreReadsEnd(const char*, int);
void AnnotateIgnoreWritesBegin(const char*, int);
void AnnotateIgnoreWritesEnd(const char*, int);
}
#endif

namespace on_cpu::races {

#ifdef G2RL_RACES

constexpr bool kWatched = true;

inline void* this_fibre() { return __tsan_get_current_fiber(); }
inline void* new_fibre() { return __tsan_create_fiber(0); }
inline void end(void* fibre) { __tsan_destroy_fiber(fibre); }
// A change of fibres orders nothing.
inline void switch_to(void* fibre) { __tsan_switch_to_fiber(fibre, 1); }

// What was done before `release(at)` comes before what is done after a later `acquire(at)`. Memory that is freed
// forgets it.
inline void release(void* at) { __tsan_release(at); }
inline void acquire(void* at) { __tsan_acquire(at); }

// Accesses of this fibre while it lives are not looked at.
struct Hidden {
  Hidden() {
    AnnotateIgnoreReadsBegin("", 0);
    AnnotateIgnoreWritesBegin("", 0);
  }
  ~Hidden() {
    AnnotateIgnoreWritesEnd("", 0);
    AnnotateIgnoreReadsEnd("", 0);
  }
};

#else

constexpr bool kWatched = false;

inline void release(void*) {}
inline void acquire(void*) {}

struct Hidden {
  Hidden() {}
};

#endif

}  // namespace on_cpu::races
