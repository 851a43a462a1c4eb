#define G2RL_ISA avx512
#define G2RL_ISA_NAME "AVX512"
#include "rowwise_impl.h"
