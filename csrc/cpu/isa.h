// The instruction set that the kernels use.
#pragma once

namespace g2rl {

// From the portable one upwards; each processor here that has one has those before it.
enum class Isa { kBase, kAvx2, kAvx512, kAvx512Bf16, kAmx };

const char* isa_name(Isa isa);

// The highest one that this build, the processor and the system have.
Isa highest_isa();

// The fastest one of those, or the one that the environment variable G2RL_CPU_ISA named when this was first called.
//
// Throws std::runtime_error: the variable holds an unknown word or a set that is missing here.
Isa isa();

}  // namespace g2rl
