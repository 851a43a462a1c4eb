#define G2RL_ISA avx2
#define G2RL_ISA_NAME "AVX2"
#include "rowwise_impl.h"
