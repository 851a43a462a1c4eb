#define G2RL_ISA avx512_bf16
#include "rowwise_impl.h"
