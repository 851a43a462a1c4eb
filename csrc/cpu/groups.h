// Features and rewards of groups of responses to shaped rewards and advantages (paper eq. 2, 9 to 13), in one call.
//
// B responses, G groups, m_max the size of the largest, d hidden. MATH.md has the formulas.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>

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

struct GroupAdvantages {
  at::Tensor advantages, shaped_rewards, scores;  // [B] of features' dtype
  at::Tensor similarity;                          // [G, m_max, m_max] of features' dtype
};

// features [B, d] fp32 or fp64; rewards [B] of the same dtype; cu_groups [G + 1] int64; valid [B] bool. Computed in
// fp64.
GroupAdvantages g2rl_advantages(const at::Tensor& features, const at::Tensor& rewards, const at::Tensor& cu_groups,
                                int64_t m_max, const std::optional<at::Tensor>& valid, const Shaping& shaping);

}  // namespace g2rl
