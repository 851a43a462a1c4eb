// A ragged batch with a head, in memory as the kernels of csrc/cuda take it, and what float64 makes of it.
#pragma once

#include <algorithm>
#include <cmath>
#include <functional>
#include <random>
#include <string>
#include <vector>

#include "../cuda/head.h"
#include "expect.h"

namespace g2rl::cuda::testing {

using Floats = std::vector<float>;

// What is allowed of each token and each response; design bounds of the project.
constexpr double kBound = 1e-5;

using g2rl::testing::expect;
using g2rl::testing::outcome;

inline void expect_below(double found, double limit, const std::string& what) {
  expect(found <= limit, what, found, limit);  // false for NaN
}

// Numbers of any of the three types, as bytes.
class Numbers {
 public:
  Numbers(Dtype dtype, size_t count) : dtype_(dtype), bytes_(count * size() + 64, 0xff) {}

  size_t size() const { return dtype_ == Dtype::fp32 ? 4 : 2; }
  // Begins `shift` numbers after an address that is aligned to 16 bytes.
  uint8_t* data() {
    return reinterpret_cast<uint8_t*>((reinterpret_cast<uintptr_t>(bytes_.data()) + 15) / 16 * 16) + shift * size();
  }
  double operator[](size_t i) {
    switch (dtype_) {
      case Dtype::bf16:
        return to_float(reinterpret_cast<bf16*>(data())[i]);
      case Dtype::fp16:
        return to_float(reinterpret_cast<fp16*>(data())[i]);
      default:
        return reinterpret_cast<float*>(data())[i];
    }
  }
  void set(size_t i, float x) {
    switch (dtype_) {
      case Dtype::bf16:
        reinterpret_cast<bf16*>(data())[i] = round_to<bf16>(x);
        break;
      case Dtype::fp16:
        reinterpret_cast<fp16*>(data())[i] = round_to<fp16>(x);
        break;
      default:
        reinterpret_cast<float*>(data())[i] = x;
    }
  }
  int shift = 0;

 private:
  Dtype dtype_;
  std::vector<uint8_t> bytes_;
};

struct Case {
  std::vector<int> lengths;
  int d, V;
  Dtype dtype = Dtype::bf16;
  bool bias = false;
  double softcap = 0, logit_scale = 1, temperature = 1;
  double spread = 1;  // of logits
  int padding = 0;    // of rows: 0 leaves them aligned where d does
  uint32_t seed = 1;
};

class Problem {
 public:
  explicit Problem(const Case& c)
      : c(c), stride(c.d + c.padding), cu(1, 0), hidden(c.dtype, 0), weight(c.dtype, 0), bias(Dtype::fp32, c.V) {
    for (const int length : c.lengths) cu.push_back(cu.back() + length);
    B = int(c.lengths.size()), N = cu.back();
    hidden = Numbers(c.dtype, (N + 1) * stride), weight = Numbers(c.dtype, (c.V + 1) * stride);
    hidden.shift = weight.shift = c.padding % 2;
    std::mt19937 random(c.seed);
    std::normal_distribution<float> normal;
    std::uniform_real_distribution<float> uniform(0.1f, 1.1f);
    // What lies between rows is NaN, as memory is in the beginning.
    for (int n = 0; n < N; ++n) {
      for (int k = 0; k < c.d; ++k) hidden.set(n * stride + k, normal(random));
    }
    const float scale = float(c.spread / std::sqrt(c.d));
    for (int v = 0; v < c.V; ++v) {
      for (int k = 0; k < c.d; ++k) weight.set(v * stride + k, scale * normal(random));
      bias.set(v, normal(random));
    }
    for (int n = 0; n < N; ++n) {
      targets.push_back(random() % c.V);
      a.push_back(n % 7 == 3 ? 0.f : uniform(random));
    }
    // The same word twice in a response, and the last one.
    for (int n = 2; n < N; n += 3) targets[n] = targets[n - 1];
    if (N > 0) targets[N - 1] = c.V - 1;
    compute();
  }

  // Again from the inputs, after a change of them.
  void compute() {
    z.assign(size_t(N) * c.V, 0);
    std::vector<double> w(c.d), h(size_t(N) * c.d);
    for (int n = 0; n < N; ++n) {
      for (int k = 0; k < c.d; ++k) h[n * c.d + k] = hidden[n * stride + k];
    }
    for (int v = 0; v < c.V; ++v) {
      for (int k = 0; k < c.d; ++k) w[k] = weight[v * stride + k];
      for (int n = 0; n < N; ++n) {
        double sum = c.bias ? bias[v] : 0;
        for (int k = 0; k < c.d; ++k) sum += w[k] * h[n * c.d + k];
        z[size_t(n) * c.V + v] = sum;
      }
    }
    follow();
  }

  // What follows from raw logits z.
  void follow() {
    log_p.assign(N, 0), entropy.assign(N, 0), lse.assign(N, 0);
    p.assign(z.size(), 0), slope.assign(z.size(), 1), R.assign(size_t(B) * c.V, 0);
    const double inner = c.softcap > 0 ? c.logit_scale / c.softcap : 1;
    const double scale = (c.softcap > 0 ? c.softcap : c.logit_scale) / c.temperature;
    for (int b = 0; b < B; ++b) {
      for (int n = cu[b]; n < cu[b + 1]; ++n) {
        double m = -INFINITY, S = 0, rest = 0;
        double* u = &p[size_t(n) * c.V];
        double* s = &slope[size_t(n) * c.V];
        for (int v = 0; v < c.V; ++v) {
          const double x = z[size_t(n) * c.V + v];
          u[v] = c.softcap > 0 ? scale * std::tanh(inner * x) : scale * x;
          s[v] = c.softcap > 0 ? std::pow(std::cosh(inner * x), -2) : 1;
          m = std::max(m, u[v]);
        }
        for (int v = 0; v < c.V; ++v) {
          S += std::exp(u[v] - m);
          if (v != targets[n]) rest += std::exp(u[v] - m);
        }
        lse[n] = m + std::log(S);
        for (int v = 0; v < c.V; ++v) {
          const double log_v = u[v] - lse[n];
          u[v] = std::exp(log_v);
          entropy[n] -= u[v] * log_v;
          const double residual = v == targets[n] ? rest / S : -u[v];
          if (v == targets[n]) log_p[n] = log_v > -0.5 ? std::log1p(-rest / S) : log_v;
          R[size_t(b) * c.V + v] += a[n] * s[v] * residual;
        }
      }
    }
  }

  Head head() {
    const bool capped = c.softcap > 0;
    return {weight.data(),
            c.bias ? bias.data() : nullptr,
            stride,
            c.V,
            c.d,
            c.dtype,
            Dtype::fp32,
            float(capped ? c.logit_scale / c.softcap : 1),
            float((capped ? c.softcap : c.logit_scale) / c.temperature),
            capped};
  }
  Tokens tokens() { return {hidden.data(), targets.data(), stride, N}; }
  Responses responses() const { return {cu.data(), B}; }

  Case c;
  int64_t stride;
  int B = 0, N = 0;
  std::vector<int> cu;
  Numbers hidden, weight, bias;
  std::vector<int64_t> targets;
  std::vector<float> a;
  std::vector<double> z, p, slope, log_p, entropy, lse, R;
};

// Responses of tokens with 1 - p_y near 1e-11, which is less than an lse in fp32 is rounded by.
inline Problem sure_tokens(Dtype dtype) {
  Problem p({.lengths = {1, 2}, .d = 136, .V = 200, .dtype = dtype, .bias = true});
  std::fill(p.targets.begin(), p.targets.end(), 7);
  p.bias.set(7, 30.f);
  p.compute();
  return p;
}

// |found - expected| / |expected| of one response's row; 0 where both are 0.
inline double relative_error(const float* found, const double* expected, int count) {
  double error = 0, norm = 0;
  for (int i = 0; i < count; ++i) {
    error += std::pow(found[i] - expected[i], 2);
    norm += expected[i] * expected[i];
  }
  return norm == 0 ? std::sqrt(error) : std::sqrt(error / norm);
}

// Results [3, N]: log p, entropy, lse.
inline void check_tokens(const Problem& p, const Floats& results, const std::string& what) {
  for (int n = 0; n < p.N; ++n) {
    const std::string at = what + ", token " + std::to_string(n);
    const double log_p = std::fabs(results[n] - p.log_p[n]);
    expect_below(log_p, std::min(kBound, 1e-4 * std::fabs(p.log_p[n]) + 1e-12), at + ": log p");
    expect_below(std::fabs(results[p.N + n] - p.entropy[n]), kBound, at + ": entropy");
    expect_below(std::fabs(results[2 * p.N + n] - p.lse[n]), kBound, at + ": lse");
  }
}

// Rows [B, width], one a response.
inline void check_rows(const Problem& p, const Floats& found, const std::vector<double>& expected, int width,
                       const std::string& what) {
  for (int b = 0; b < p.B; ++b) {
    const size_t at = size_t(b) * width;
    expect_below(relative_error(&found[at], &expected[at], width), kBound, what + " of response " + std::to_string(b));
  }
}

// Terms with memory for them.
struct OwnTerms {
  explicit OwnTerms(int N) : memory(5 * size_t(N), NAN), terms{at(0, N), at(1, N), at(2, N), at(3, N), at(4, N)} {}
  float* at(int row, int N) { return memory.data() + size_t(row) * N; }
  Terms from(int first) const {
    return {terms.shift + first, terms.weight + first, terms.target + first, terms.S + first, terms.rest + first};
  }
  std::vector<float> memory;
  Terms terms;
};

// For chunks that follow each other.
struct OwnCarry {
  explicit OwnCarry(int V) : from(V, NAN), to(V, NAN) {}
  Carry next() {
    std::swap(from, to);
    return {from.data(), to.data()};
  }
  std::vector<float> from, to;
};

// What sums of a long response must not lose. With logits of 0 and an lse of ln 2 each token leaves a / 2 to its
// target, which is word 0 or 1, and -a / 2 to the other words.
//
// Targets meet what other tokens leave in their words before either is a sum of thousands, and cancel it to the last
// digit: of weights from 0.5 to 1 in multiples of 2^-14 fp32 holds any 512 added up, but not all that word 0 has of
// either kind. And after one token of weight 1 others of 2^-28 count.
using Residuals = std::function<void(Problem&, const Floats& lse, float* R)>;
inline void check_long_response(Problem p, const Residuals& residuals, const std::string& what) {
  float half = 0.693147f;
  while (half * kLog2e < 1) half = std::nextafter(half, 1.f);
  expect(half * kLog2e == 1, "an lse of half", half * kLog2e, 1);
  const Floats lse(p.N, half);
  for (const bool cancels : {true, false}) {
    double sums[2] = {};
    for (int n = 0; n < p.N; ++n) {
      p.targets[n] = n % 2;
      p.a[n] = cancels ? float((n * 2654435761u >> 7) % 8191 + 8192) * 0x1p-14f : n == 0 ? 1.f : 0x1p-28f;
      sums[n % 2] += p.a[n] / 2;
      for (int k = 0; k < p.c.d; ++k) p.hidden.set(n * p.stride + k, 0.f);
    }
    Floats R(p.c.V, NAN);
    residuals(p, lse, R.data());
    const double difference = sums[0] - sums[1], sum = sums[0] + sums[1], within = 4e-6 * sum;
    for (int v = 0; v < 2; ++v) {
      const double expected = v == 0 ? difference : -difference;
      expect_below(std::fabs(R[v] - expected), cancels ? 0x1p-23 * std::fabs(expected) : within,
                   what + ": a target of a long response");
    }
    for (int v = 2; v < p.c.V; ++v) expect_below(std::fabs(R[v] + sum), within, what + ": a long response");
  }
}

// The two kernels of a generation: with the lse for known statistics, and with one that is given.
inline Residuals of_statistics(decltype(sm90::residuals)* kernel) {
  return [kernel](Problem& p, const Floats& lse, float* R) {
    OwnTerms terms(p.N);
    for (int n = 0; n < p.N; ++n) {
      terms.terms.shift[n] = lse[n] * kLog2e, terms.terms.weight[n] = p.a[n], terms.terms.target[n] = p.a[n] / 2;
    }
    std::vector<int> packing(packing_bytes(p.N, p.B) / sizeof(int));
    kernel(p.head(), p.tokens(), p.responses(), terms.terms, nullptr, packing.data(), R, nullptr);
  };
}
inline Residuals of_given_lse(decltype(sm90::residuals_and_statistics)* kernel, int splits) {
  return [kernel, splits](Problem& p, const Floats& lse, float* R) {
    Floats planes(4 * size_t(splits) * p.N, NAN);
    std::vector<int> packing(packing_bytes(p.N, p.B) / sizeof(int));
    kernel(p.head(), p.tokens(), p.responses(), lse.data(), p.a.data(), packing.data(), R, {planes.data(), splits},
           nullptr);
  };
}

}  // namespace g2rl::cuda::testing
