// The LM head without its logits: log-probabilities, entropy, sequence features and their gradients, for CPUs. MATH.md
// has the formulas.
//
// N tokens, d hidden, V vocabulary, B responses; u = logits / temperature, y = target, p = softmax(u), lse = log sum
// exp u. workspace_bytes: what a pass may allocate for what it keeps of its logits, and for partial sums of features,
// of which 16 responses' are the least; 0 for 5 % of fp32 logits, or 64 MiB if that is more; more of it saves time.
// Every result is the same whatever it and the number of threads are, and a response's results do not depend on its
// neighbours in the batch.
#pragma once

#include <ATen/core/Tensor.h>

#include <array>
#include <optional>
#include <tuple>

namespace g2rl {

struct Head {
  at::Tensor weight;               // [V, d] bf16, fp16 or fp32
  std::optional<at::Tensor> bias;  // [V]
  double temperature;
  double logit_scale;
  double softcap;  // 0 = none
};

struct TokenStats {
  at::Tensor logps, entropy, lse;  // [N] fp32
};

// hidden [N, d] of the weight's dtype, targets [N] int64.
TokenStats token_logprobs(const at::Tensor& hidden, const Head& head, const at::Tensor& targets);

// cu_seqlens [B + 1] int64; token_weights [N] fp32; lse [N] fp32 of the same head, good to about 1e-4, saves one of two
// passes. features [B, d] fp32.
std::tuple<at::Tensor, TokenStats> sequence_features(const at::Tensor& hidden, const Head& head,
                                                     const at::Tensor& targets, const at::Tensor& cu_seqlens,
                                                     const std::optional<at::Tensor>& token_weights,
                                                     const std::optional<at::Tensor>& lse, int64_t workspace_bytes);

// Where the head holds a part of the vocabulary, targets in other parts are -1.
//
// Sums over the part, [4, N] fp32: a reference m, sums of exp(u - m) and of exp(u - m) (u - m) without the target, and
// the target's W h + b, 0 in other parts.
at::Tensor token_sums(const at::Tensor& hidden, const Head& head, const at::Tensor& targets);

// From the sums of all parts, [4, parts, N]: the tokens' results, and this part's share of the features.
std::tuple<at::Tensor, TokenStats> part_features(const at::Tensor& hidden, const Head& head, const at::Tensor& targets,
                                                 const at::Tensor& cu_seqlens,
                                                 const std::optional<at::Tensor>& token_weights, const at::Tensor& sums,
                                                 int64_t workspace_bytes);

// Gradients of sum(grad_logps * logps + grad_entropy * entropy); a tensor that is not needed is undefined. With the
// results of all parts, a part's own gradients, and its share of hidden's.
struct Needs {
  bool hidden, weight, bias;
};
std::array<at::Tensor, 3> logprobs_backward(const at::Tensor& grad_logps, const at::Tensor& grad_entropy,
                                            const at::Tensor& hidden, const Head& head, const at::Tensor& targets,
                                            const TokenStats& stats, int64_t workspace_bytes, Needs needs);

}  // namespace g2rl
