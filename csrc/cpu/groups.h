// Features and rewards of groups of responses to shaped rewards and advantages (paper eq. 2, 9 to 13), in one call.
//
// B responses, G groups, m_max the size of the largest, d hidden. MATH.md has the formulas.
#pragma once

#include <cstdint>

namespace g2rl {

enum class Rule { scale, centered, literal };

struct Shaping {
  double strength;  // lambda
  double clip;      // c
  Rule rule;
  double min_range;   // groups whose scores span less keep their rewards
  bool drop_uniform;  // so do groups whose raw rewards are all equal
  bool divide_by_std;
};

// All memory is the caller's.
struct Groups {
  const float* features;     // [B, d]
  const double* rewards;     // [B]
  const int64_t* cu_groups;  // [G + 1]
  const bool* valid;         // [B]; null where all are
  int64_t G, d, m_max;
};

struct GroupAdvantages {
  float *advantages, *shaped_rewards, *scores;  // [B]
  float* similarity;                            // [G, m_max, m_max]
};

// Computed in fp64.
void g2rl_advantages(const Groups& groups, const Shaping& shaping, const GroupAdvantages& out);

}  // namespace g2rl
