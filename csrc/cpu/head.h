// The LM head without its logits: log-probabilities, entropy, sequence features and their gradients, for CPUs. MATH.md
// has the formulas.
//
// N tokens, d hidden, V vocabulary, B responses; u = logits / temperature, y = target, p = softmax(u), lse = log sum
// exp u. workspace_bytes: what a pass may allocate for what it keeps of its logits, and for partial sums of features,
// of which 16 responses' are the least, as a tile of gradients of logits is for each thread; 0 for 5 % of fp32 logits,
// or 64 MiB if that is more and products are not as cheap as AMX's of bf16 with a small d; more of it saves time. Every
// result is the same whatever it and the number of threads are, and a response's results do not depend on its
// neighbours in the batch.
//
// All memory is the caller's, results included; only what may be null says so.
#pragma once

#include "matrix.h"

namespace g2rl {

struct Head {
  Matrix weight;       // [V, d]
  const double* bias;  // [V], or null
  double temperature;
  double logit_scale;
  double softcap;  // 0 = none
};

struct Tokens {
  Matrix hidden;           // [N, d] of the weight's dtype
  const int64_t* targets;  // [N]
};

struct TokenStats {
  float *logps, *entropy, *lse;  // [N]
};

struct Batch {
  const int64_t* cu_seqlens;  // [B + 1]
  int64_t B;
  const float* token_weights;  // [N]; null for ones
};

void token_logprobs(const Tokens& tokens, const Head& head, const TokenStats& stats);

// features [B, d]. lse [N] of the same head, good to about 1e-4, saves one of two passes; null where it is not known.
void sequence_features(const Tokens& tokens, const Head& head, const Batch& batch, const float* lse,
                       int64_t workspace_bytes, float* features, const TokenStats& stats);

// Where the head holds a part of the vocabulary, targets in other parts are -1.
//
// Sums over the part, [4, N]: a reference m, sums of exp(u - m) and of exp(u - m) (u - m) without the target, and the
// target's W h + b, 0 in other parts.
void token_sums(const Tokens& tokens, const Head& head, float* sums);

// From the sums of all parts, [4, parts, N]: the tokens' results, and this part's share of the features.
void part_features(const Tokens& tokens, const Head& head, const Batch& batch, const float* sums, int64_t parts,
                   int64_t workspace_bytes, float* features, const TokenStats& stats);

// Null for what is not needed.
struct Gradients {
  void *hidden, *weight;  // [N, d] and [V, d] of their dtype
  float* bias;            // [V]
};

// Gradients of sum(grad_logps * logps + grad_entropy * entropy), both [N]. With the results of all parts, a part's own
// gradients, and its share of hidden's.
void logprobs_backward(const float* grad_logps, const float* grad_entropy, const Tokens& tokens, const Head& head,
                       const TokenStats& stats, int64_t workspace_bytes, const Gradients& out);

}  // namespace g2rl
