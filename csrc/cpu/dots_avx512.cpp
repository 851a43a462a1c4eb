#define G2RL_ISA avx512
#include "dots_impl.h"
