// Chooses the instruction set, by ATen's own test so that ATEN_CPU_CAPABILITY steers this library too.
#include "dots.h"

#include <ATen/Version.h>

#include <string>

namespace g2rl {

namespace base {
const DotKernels& dot_kernels();
}
#if defined(__x86_64__)
namespace avx2 {
const DotKernels& dot_kernels();
}
namespace avx512 {
const DotKernels& dot_kernels();
}
#endif

const DotKernels& dots() {
  static const DotKernels& chosen = []() -> const DotKernels& {
#if defined(__x86_64__)
    const std::string isa = at::get_cpu_capability();
    if (isa == "AVX512") return avx512::dot_kernels();
    if (isa == "AVX2") return avx2::dot_kernels();
#endif
    return base::dot_kernels();
  }();
  return chosen;
}

}  // namespace g2rl
