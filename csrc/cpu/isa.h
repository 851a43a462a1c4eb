// The instruction set that the kernels use.
#pragma once

#include <string>
#include <vector>

namespace g2rl {

enum class Isa { kBase, kNeonBf16, kAvx2, kAvx512, kAvx512Bf16, kAmx };

// Those of this architecture, from the portable one upwards; each processor that has one has those before it.
#if defined(__aarch64__)
constexpr Isa kIsas[] = {Isa::kBase, Isa::kNeonBf16};  // NEON itself is every processor's
#else
constexpr Isa kIsas[] = {Isa::kBase, Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16, Isa::kAmx};
#endif

const char* isa_name(Isa isa);

// Of those up to `highest`, which comes first.
std::vector<std::string> isa_names(Isa highest);

// The highest one that this build, the processor and the system have.
Isa highest_isa();

// The fastest one of those, or the one that the environment variable G2RL_CPU_ISA named when this was first called.
//
// Throws std::runtime_error: the variable holds an unknown word or a set that is missing here.
Isa isa();

}  // namespace g2rl
