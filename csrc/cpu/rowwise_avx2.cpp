#define G2RL_ISA avx2
#include "rowwise_impl.h"
