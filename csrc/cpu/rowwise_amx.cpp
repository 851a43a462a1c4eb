#define G2RL_ISA amx
#define G2RL_ISA_NAME "AMX"
#include "rowwise_impl.h"
