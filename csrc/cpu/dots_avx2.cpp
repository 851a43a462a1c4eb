#define G2RL_ISA avx2
#include "dots_impl.h"
