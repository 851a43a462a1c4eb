#define G2RL_ISA amx
#include "rowwise_impl.h"
