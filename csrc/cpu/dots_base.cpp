#define G2RL_ISA base
#include "dots_impl.h"
