// Chooses the instruction set, by ATen's and oneDNN's own tests so that ATEN_CPU_CAPABILITY and DNNL_MAX_CPU_ISA steer
// this library too.
#include "rowwise.h"

#include <ATen/Version.h>
#include <ATen/native/CPUBlas.h>

#include <string>

#if defined(G2RL_WITH_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

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
#if defined(G2RL_WITH_AMX)
namespace amx {
const RowKernels& table();
}

namespace {

// Linux lends the tile registers to a process that asks for them.
bool may_use_tiles() {
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  return at::native::cpublas::could_pack(at::kBFloat16) && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}

}  // namespace
#endif

const RowKernels& rowwise() {
  static const RowKernels& chosen = []() -> const RowKernels& {
#if defined(__x86_64__)
    const std::string isa = at::get_cpu_capability();
#if defined(G2RL_WITH_AMX)
    if (isa == "AVX512" && may_use_tiles()) return amx::table();
#endif
    if (isa == "AVX512") return avx512::table();
    if (isa == "AVX2") return avx2::table();
#endif
    return base::table();
  }();
  return chosen;
}

}  // namespace g2rl
