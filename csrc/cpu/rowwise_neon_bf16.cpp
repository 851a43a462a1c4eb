#define G2RL_ISA neon_bf16
#include "rowwise_impl.h"
