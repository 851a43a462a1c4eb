#include "rowwise.h"

#include "isa.h"

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
namespace avx512_bf16 {
const RowKernels& table();
}
namespace amx {
const RowKernels& table();
}
#elif defined(__aarch64__)
namespace neon_bf16 {
const RowKernels& table();
}
#endif

const RowKernels& rowwise() {
  static const RowKernels& chosen = []() -> const RowKernels& {
    switch (isa()) {
#if defined(G2RL_WITH_AMX)
      case Isa::kAmx:
        return amx::table();
#endif
#if defined(G2RL_WITH_AVX512_BF16)
      case Isa::kAvx512Bf16:
        return avx512_bf16::table();
#endif
#if defined(__x86_64__)
      case Isa::kAvx512:
        return avx512::table();
      case Isa::kAvx2:
        return avx2::table();
#endif
#if defined(G2RL_WITH_NEON_BF16)
      case Isa::kNeonBf16:
        return neon_bf16::table();
#endif
      default:
        return base::table();
    }
  }();
  return chosen;
}

}  // namespace g2rl
