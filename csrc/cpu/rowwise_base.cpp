#define G2RL_ISA base
#include "rowwise_impl.h"
