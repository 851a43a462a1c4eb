#include "parallel.h"

// Of <omp.h>, which compilers for macOS do not bring.
extern "C" int omp_get_max_threads();

namespace g2rl {
namespace {

thread_local int of_this_thread = 0;

}  // namespace

int num_threads() { return of_this_thread > 0 ? of_this_thread : omp_get_max_threads(); }

Threads::Threads(int count) : before_(of_this_thread) { of_this_thread = count; }
Threads::~Threads() { of_this_thread = before_; }

}  // namespace g2rl
