// The whole group mathematics in one launch; MATH.md section 7 has the formulas, eager/groups.py the plain form.
#pragma once

#include "platform.h"

namespace g2rl::cuda {

enum class Rule : int { scale, centered, literal };

struct Shaping {
  float strength, clip;  // clip: of what shaping makes of a reward, at least its own size; infinity for none
  Rule rule;
  float min_range;
  bool drop_uniform;  // groups of equal rewards keep them
  bool by_std;        // GRPO; otherwise Dr. GRPO
};

struct Groups {
  const float* features;  // [B, d], rows `stride` elements apart
  const float* rewards;   // [B]
  const int* cu_groups;   // [G + 1]
  const uint8_t* valid;   // [B], or null
  int64_t stride;
  int G, d, m_max;
};

struct Advantages {
  float* advantages;      // [B]
  float* shaped_rewards;  // [B]
  float* scores;          // [B]
  float* similarity;      // [G, m_max, m_max], padded with 0
};

// Largest group that one block's shared memory holds.
int most_members();
// 0 or CUDA's error code.
int g2rl_advantages(const Groups&, const Shaping&, const Advantages&, Stream);

}  // namespace g2rl::cuda
