#include "dots.h"

#include "isa.h"

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
#if defined(__x86_64__)
  if (isa() >= Isa::kAvx512) return avx512::dot_kernels();
  if (isa() == Isa::kAvx2) return avx2::dot_kernels();
#endif
  return base::dot_kernels();
}

}  // namespace g2rl
