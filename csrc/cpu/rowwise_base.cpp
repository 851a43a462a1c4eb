#define G2RL_ISA base
#define G2RL_ISA_NAME "BASE"
#include "rowwise_impl.h"
