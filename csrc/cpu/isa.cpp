#include "isa.h"

#include <algorithm>
#include <cstdlib>
#include <iterator>
#include <stdexcept>
#include <string>

#if defined(G2RL_WITH_AMX)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(G2RL_WITH_NEON_BF16) && defined(__APPLE__)
#include <sys/sysctl.h>
#elif defined(G2RL_WITH_NEON_BF16)
#include <sys/auxv.h>
#endif

namespace g2rl {
namespace {

constexpr const char* kVariable = "G2RL_CPU_ISA";
constexpr const char* kNames[] = {"base", "neon_bf16", "avx2", "avx512", "avx512_bf16", "amx"};

// Whether instructions for bf16 are in software.
#if defined(G2RL_EMULATE_BF16)
[[maybe_unused]] constexpr bool kEmulated = true;
#else
[[maybe_unused]] constexpr bool kEmulated = false;
#endif

#if defined(G2RL_WITH_AMX)
// The processor has bf16 tiles, and Linux lends the tile registers to a process that asks for them.
bool may_use_tiles() {
  constexpr unsigned kBf16 = 1u << 22, kTiles = 1u << 24;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kBf16) && (d & kTiles) &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

#if defined(G2RL_WITH_NEON_BF16)
bool has_neon_bf16() {
#if defined(__APPLE__)
  int found = 0;
  size_t size = sizeof(found);
  return sysctlbyname("hw.optional.arm.FEAT_BF16", &found, &size, nullptr, 0) == 0 && found;
#else
  constexpr unsigned long kBf16 = 1ul << 14;  // HWCAP2_BF16, which older headers lack
  return getauxval(AT_HWCAP2) & kBf16;
#endif
}
#endif

// Intel's cores multiply pairs of bf16 with vdpbf16ps at half the rate at which they multiply the same numbers widened
// to fp32. On AMD's, bf16 products are the faster ones by a factor of 2.6.
Isa fastest() {
  const Isa highest = highest_isa();
#if defined(__x86_64__)
  if (highest == Isa::kAvx512Bf16 && __builtin_cpu_is("intel")) return Isa::kAvx512;
#endif
  return highest;
}

std::string list(Isa highest) {
  std::string names;
  for (const std::string& name : isa_names(highest)) names += (names.empty() ? "" : ", ") + name;
  return names;
}

Isa choose() {
  const Isa highest = highest_isa();
  const char* wanted = std::getenv(kVariable);
  if (!wanted || !*wanted) return fastest();
  const auto named =
      std::find_if(std::begin(kIsas), std::end(kIsas), [&](Isa isa) { return isa_name(isa) == std::string(wanted); });
  const std::string variable = kVariable, found = std::string("'") + wanted + "'";
  if (named == std::end(kIsas))
    throw std::runtime_error(variable + ": expected one of " + list(*std::rbegin(kIsas)) + ", found " + found);
  if (*named > highest)
    throw std::runtime_error(variable + ": " + found + " is more than this processor and build have, which is " +
                             list(highest));
  return *named;
}

}  // namespace

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

std::vector<std::string> isa_names(Isa highest) {
  std::vector<std::string> names;
  for (const Isa isa : kIsas)
    if (isa <= highest) names.insert(names.begin(), isa_name(isa));
  return names;
}

Isa highest_isa() {
  Isa highest = Isa::kBase;
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return highest;
  highest = Isa::kAvx2;
  if (!__builtin_cpu_supports("avx512f") || !__builtin_cpu_supports("avx512bw") ||
      !__builtin_cpu_supports("avx512dq") || !__builtin_cpu_supports("avx512vl"))
    return highest;
  highest = Isa::kAvx512;
#if defined(G2RL_WITH_AVX512_BF16)
  if (!kEmulated && !__builtin_cpu_supports("avx512bf16")) return highest;
  highest = Isa::kAvx512Bf16;
#endif
#if defined(G2RL_WITH_AMX)
  if (kEmulated || may_use_tiles()) highest = Isa::kAmx;
#endif
#elif defined(G2RL_WITH_NEON_BF16)
  if (has_neon_bf16()) highest = Isa::kNeonBf16;
#endif
  return highest;
}

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

}  // namespace g2rl
