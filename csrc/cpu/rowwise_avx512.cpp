#define G2RL_ISA avx512
#include "rowwise_impl.h"
