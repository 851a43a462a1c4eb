// Chooses the instruction set, by ATen's own test so that ATEN_CPU_CAPABILITY steers this library too.
#include "rowwise.h"

#include <ATen/Version.h>

#include <string>

namespace g2rl {

namespace base {
const RowKernels& table();
}
#if defined(__x86_64__)
namespace avx2 {
const RowKernels& table();
}
namespace avx512 {
const RowKernels& table();
}
#endif

const RowKernels& rowwise() {
  static const RowKernels& chosen = []() -> const RowKernels& {
#if defined(__x86_64__)
    const std::string isa = at::get_cpu_capability();
    if (isa == "AVX512") return avx512::table();
    if (isa == "AVX2") return avx2::table();
#endif
    return base::table();
  }();
  return chosen;
}

}  // namespace g2rl
