// A batch with a head, in memory as the kernels of csrc/cpu take it, and what they return.
#pragma once

#include <cmath>
#include <random>
#include <vector>

#include "../cpu/head.h"
#include "../cpu/rowwise.h"
#include "expect.h"

namespace g2rl::testing {

using Random = std::mt19937;

inline double difference(const std::vector<float>& a, const std::vector<float>& b) {
  double most = 0;
  for (size_t i = 0; i < a.size(); ++i) most = std::max(most, std::abs(double(a[i]) - b[i]));
  return most;
}

inline std::vector<float> normal(int64_t count, Random& random, float scale = 1) {
  std::normal_distribution<float> draw;
  std::vector<float> out(count);
  for (float& x : out) x = scale * draw(random);
  return out;
}

inline std::vector<float> positive(int64_t count, Random& random) {
  std::uniform_real_distribution<float> draw(0.1f, 1.1f);
  std::vector<float> out(count);
  for (float& x : out) x = draw(random);
  return out;
}

inline std::vector<int64_t> words(int64_t count, int64_t V, Random& random) {
  std::uniform_int_distribution<int64_t> draw(0, V - 1);
  std::vector<int64_t> out(count);
  for (int64_t& y : out) y = draw(random);
  return out;
}

// A matrix of numbers of any dtype.
class Numbers {
 public:
  Numbers() = default;
  Numbers(Dtype dtype, int64_t cols, const std::vector<float>& values)
      : dtype_(dtype), cols_(cols), size_(dtype == Dtype::kFloat ? 4 : 2), bytes_(values.size() * size_) {
    rowwise().narrow(values.data(), dtype, values.size(), bytes_.data());
  }
  int64_t rows() const { return static_cast<int64_t>(bytes_.size()) / (cols_ * size_); }
  int64_t cols() const { return cols_; }
  // `count` rows from `first` on.
  Matrix matrix(int64_t first, int64_t count) const {
    return {bytes_.data() + first * cols_ * size_, count, cols_, cols_ * size_, dtype_};
  }
  std::vector<float> values() const {
    std::vector<float> out(rows() * cols_);
    rowwise().widen(bytes_.data(), dtype_, out.size(), out.data());
    return out;
  }
  Numbers like() const { return Numbers(dtype_, cols_, std::vector<float>(rows() * cols_)); }
  void* data() { return bytes_.data(); }
  bool operator==(const Numbers&) const = default;

 private:
  Dtype dtype_{};
  int64_t cols_ = 1, size_ = 4;
  std::vector<char> bytes_;
};

struct Results {
  std::vector<float> features, logps, entropy, lse;
  TokenStats stats() { return {logps.data(), entropy.data(), lse.data()}; }
  bool operator==(const Results&) const = default;
};

struct GradientsOf {
  Numbers hidden, weight;
  std::vector<float> bias;
};

struct Problem {
  Numbers hidden, weight;
  std::vector<int64_t> targets, cu_seqlens;
  std::vector<float> token_weights;  // may be empty
  std::vector<double> bias;          // may be empty
  double temperature = 1, logit_scale = 1, softcap = 0;

  int64_t N() const { return hidden.rows(); }
  int64_t d() const { return hidden.cols(); }
  int64_t V() const { return weight.rows(); }
  int64_t B() const { return static_cast<int64_t>(cu_seqlens.size()) - 1; }

  Tokens tokens() const { return {hidden.matrix(0, N()), targets.data()}; }
  // Words first..last.
  Head head(int64_t first, int64_t last) const {
    const double* b = bias.empty() ? nullptr : bias.data() + first;
    return {weight.matrix(first, last - first), b, temperature, logit_scale, softcap};
  }
  Head head() const { return head(0, V()); }
  Batch batch() const { return {cu_seqlens.data(), B(), token_weights.empty() ? nullptr : token_weights.data()}; }

  Results empty() const {
    const std::vector<float> of_tokens(N());
    return {std::vector<float>(B() * d()), of_tokens, of_tokens, of_tokens};
  }

  Results token_logprobs() const {
    Results out = empty();
    g2rl::token_logprobs(tokens(), head(), out.stats());
    return out;
  }

  Results sequence_features(int64_t workspace_bytes = 0, const float* lse = nullptr) const {
    Results out = empty();
    g2rl::sequence_features(tokens(), head(), batch(), lse, workspace_bytes, out.features.data(), out.stats());
    return out;
  }

  struct Needs {
    bool hidden, weight, bias;
  };
  GradientsOf gradients(const std::vector<float>& grad_logps, const std::vector<float>& grad_entropy, Results& saved,
                        int64_t workspace_bytes, Needs needs) const {
    GradientsOf out{hidden.like(), weight.like(), std::vector<float>(V())};
    g2rl::logprobs_backward(grad_logps.data(), grad_entropy.data(), tokens(), head(), saved.stats(), workspace_bytes,
                            {needs.hidden ? out.hidden.data() : nullptr, needs.weight ? out.weight.data() : nullptr,
                             needs.bias ? out.bias.data() : nullptr});
    return out;
  }
};

}  // namespace g2rl::testing
