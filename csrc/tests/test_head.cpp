// Kernels against double loops over the definitions, in every dtype and with every head option.
#include <ATen/ATen.h>

#include <cmath>
#include <cstdio>
#include <thread>
#include <vector>

#include "../cpu/head_features.h"

namespace {

int failures = 0;

void expect(bool ok, const char* what, double got, double limit) {
  if (ok) return;
  std::printf("FAILED %s: %.3g exceeds %.3g\n", what, got, limit);
  ++failures;
}

struct Case {
  int64_t N, d, V;
  at::ScalarType dtype;
  double temperature, scale, cap;
  bool bias;
};

struct Row {
  std::vector<double> residual;  // [V], (e_y - p) D
  double logp, entropy;
};

Row row_by_definition(const double* h, const double* w, const double* b, int64_t y, const Case& c) {
  std::vector<double> u(c.V), slope(c.V, 1.0);
  double top = -INFINITY;
  for (int64_t v = 0; v < c.V; ++v) {
    double z = b ? b[v] : 0.0;
    for (int64_t i = 0; i < c.d; ++i) z += h[i] * w[v * c.d + i];
    z *= c.scale;
    if (c.cap > 0) {
      slope[v] = 1 / std::pow(std::cosh(z / c.cap), 2);
      z = c.cap * std::tanh(z / c.cap);
    }
    u[v] = z / c.temperature;
    top = std::max(top, u[v]);
  }
  double rest = 0, all = 0;
  for (int64_t v = 0; v < c.V; ++v) {
    all += std::exp(u[v] - top);
    if (v != y) rest += std::exp(u[v] - top);
  }
  const double lse = top + std::log(all);
  Row out{std::vector<double>(c.V), u[y] - lse, 0};
  for (int64_t v = 0; v < c.V; ++v) {
    const double p = std::exp(u[v] - lse);
    out.entropy -= p * (u[v] - lse);
    out.residual[v] = (v == y ? rest / all : -p) * slope[v];
  }
  return out;
}

// Two parts of the vocabulary, the first of a single word, add up to the results of the whole.
void check_parts(const g2rl::Head& head, const at::Tensor& hidden, const at::Tensor& targets, const at::Tensor& cu,
                 const at::Tensor& weights, const at::Tensor& features, const g2rl::TokenStats& stats) {
  std::vector<g2rl::Head> parts(2, head);
  std::vector<at::Tensor> local, sums;
  for (int64_t i = 0; i < 2; ++i) {
    const int64_t first = i, last = i == 0 ? 1 : head.weight.size(0);
    parts[i].weight = head.weight.slice(0, first, last);
    if (head.bias) parts[i].bias = head.bias->slice(0, first, last);
    const at::Tensor y = targets - first;
    local.push_back(at::where((y >= 0).logical_and(y < last - first), y, -1));
    sums.push_back(g2rl::token_sums(hidden, parts[i], local[i]));
  }
  at::Tensor total = at::zeros_like(features);
  for (int64_t i = 0; i < 2; ++i) {
    const auto [share, of_parts] = g2rl::part_features(hidden, parts[i], local[i], cu, weights, at::stack(sums, 1), 0);
    total += share;
    const double error = (of_parts.logps - stats.logps).abs().max().item<double>();
    expect(error <= 1e-5, "log p of parts", error, 1e-5);
  }
  const double error = (total - features).norm().item<double>(), limit = 1e-5 * features.norm().item<double>();
  expect(error <= limit, "features of parts", error, limit);
}

void check(const Case& c) {
  at::manual_seed(c.N + c.d);
  const at::Tensor hidden = at::randn({c.N, c.d}).to(c.dtype), weight = (at::randn({c.V, c.d}) * 0.3).to(c.dtype);
  const at::Tensor bias = at::randn({c.V}), targets = at::randint(c.V, {c.N}, at::kLong),
                   weights = at::rand({c.N}) + 0.1;
  const int64_t split = c.N / 3;
  const at::Tensor cu = at::tensor({int64_t{0}, split, split, c.N}, at::kLong);  // the middle response is empty
  const g2rl::Head head{weight, c.bias ? std::optional<at::Tensor>(bias) : std::nullopt, c.temperature, c.scale, c.cap};
  const auto [features, stats] = g2rl::sequence_features(hidden, head, targets, cu, weights, std::nullopt, 0);
  const auto [one_pass, again] = g2rl::sequence_features(hidden, head, targets, cu, weights, stats.lse, 0);
  const auto [twice, twice_stats] = g2rl::sequence_features(hidden, head, targets, cu, weights, std::nullopt, 1);
  expect(at::equal(features, twice) && at::equal(stats.lse, twice_stats.lse), "bits where nothing is kept", 1, 0);
  check_parts(head, hidden, targets, cu, weights, features, stats);

  const at::Tensor h = hidden.to(at::kDouble), w = weight.to(at::kDouble), b = bias.to(at::kDouble);
  std::vector<Row> rows;
  for (int64_t t = 0; t < c.N; ++t) {
    rows.push_back(row_by_definition(h.const_data_ptr<double>() + t * c.d, w.const_data_ptr<double>(),
                                     c.bias ? b.const_data_ptr<double>() : nullptr,
                                     targets.const_data_ptr<int64_t>()[t], c));
    for (const g2rl::TokenStats* s : {&stats, &again}) {
      const double logp = std::abs(s->logps.const_data_ptr<float>()[t] - rows.back().logp);
      const double entropy = std::abs(s->entropy.const_data_ptr<float>()[t] - rows.back().entropy);
      expect(logp <= 1e-5, "log p", logp, 1e-5);
      expect(entropy <= 1e-5, "entropy", entropy, 1e-5);
    }
  }
  for (int64_t r = 0; r < 3; ++r) {
    const int64_t begin = cu.const_data_ptr<int64_t>()[r], end = cu.const_data_ptr<int64_t>()[r + 1];
    double sum = 0, error = 0, error_one_pass = 0, norm = 0;
    for (int64_t t = begin; t < end; ++t) sum += weights.const_data_ptr<float>()[t];
    for (int64_t i = 0; i < c.d; ++i) {
      double phi = 0;
      for (int64_t t = begin; t < end; ++t)
        for (int64_t v = 0; v < c.V; ++v)
          phi += c.scale * weights.const_data_ptr<float>()[t] / sum * rows[t].residual[v] *
                 w.const_data_ptr<double>()[v * c.d + i];
      error += std::pow(features.const_data_ptr<float>()[r * c.d + i] - phi, 2);
      error_one_pass += std::pow(one_pass.const_data_ptr<float>()[r * c.d + i] - phi, 2);
      norm += phi * phi;
    }
    const double limit = 1e-5 * std::sqrt(norm);
    expect(std::sqrt(error) <= limit, "features", std::sqrt(error), limit);
    expect(std::sqrt(error_one_pass) <= limit, "features with lse", std::sqrt(error_one_pass), limit);
  }

  // dhidden is linear in residuals: with a gradient of log p alone it is scale / T * W^T residual.
  const auto grads =
      g2rl::logprobs_backward(at::ones({c.N}), at::zeros({c.N}), hidden, head, targets, stats, 0, {true, true, c.bias});
  const at::Tensor dh = grads[0].to(at::kDouble);
  double error = 0, norm = 0;
  for (int64_t t = 0; t < c.N; ++t)
    for (int64_t i = 0; i < c.d; ++i) {
      double expected = 0;
      for (int64_t v = 0; v < c.V; ++v)
        expected += c.scale / c.temperature * rows[t].residual[v] * w.const_data_ptr<double>()[v * c.d + i];
      error += std::pow(dh.const_data_ptr<double>()[t * c.d + i] - expected, 2);
      norm += expected * expected;
    }
  const double tolerance = c.dtype == at::kFloat  ? 1e-5
                           : c.dtype == at::kHalf ? 1e-3
                                                  : 6e-3;  // a rounding of the output and one of g
  expect(std::sqrt(error / norm) <= tolerance, "dhidden", std::sqrt(error / norm), tolerance);
}

// The plan with one product, in one block of tokens and in several, which must agree with two products to the bit,
// responses across blocks, empty and of one token included.
void check_plans(at::ScalarType dtype, bool bias) {
  constexpr int64_t N = 3000, d = 64, V = 4001;
  at::manual_seed(7);
  const at::Tensor hidden = (at::randn({N, d}) * 0.5).to(dtype), weight = at::randn({V, d}).to(dtype),
                   targets = at::randint(V, {N}, at::kLong);
  const at::Tensor cu = at::tensor({int64_t{0}, int64_t{1}, int64_t{1}, int64_t{250}, int64_t{777}, N}, at::kLong),
                   weights = at::rand({N}) + 0.1;
  const g2rl::Head head{weight, bias ? std::optional<at::Tensor>(at::randn({V})) : std::nullopt, 0.9, 1.1, 0.0};
  constexpr int64_t kSome = N * V / 2, kPlenty = 1 << 30, kNone = 1;
  const g2rl::KeptPlan plan =
      g2rl::plan_kept(g2rl::HeadProblem(hidden, head, targets), cu.const_data_ptr<int64_t>(), 5, kSome);
  expect(plan.tokens > 0 && plan.tokens < N, "tokens per block", plan.tokens, N);
  const auto [twice, twice_stats] = g2rl::sequence_features(hidden, head, targets, cu, weights, std::nullopt, kNone);
  for (const int64_t workspace : {kSome, kPlenty}) {
    const auto [kept, stats] = g2rl::sequence_features(hidden, head, targets, cu, weights, std::nullopt, workspace);
    expect(at::equal(kept, twice), "features of both plans", (kept - twice).abs().max().item<double>(), 0);
    expect(at::equal(stats.logps, twice_stats.logps) && at::equal(stats.entropy, twice_stats.entropy),
           "statistics of both plans", 1, 0);
  }
}

// Several callers at once, each with the bits that it gets alone: nothing is shared that calls write to.
void check_callers(at::ScalarType dtype) {
  constexpr int64_t N = 70, d = 33, V = 700;
  constexpr int kCallers = 8, kRounds = 3;
  struct Caller {
    at::Tensor hidden, weight, targets;
    std::vector<at::Tensor> alone;
    bool same = true;

    std::vector<at::Tensor> results() const {
      const g2rl::Head head{weight, std::nullopt, 0.9, 1.1, 5.0};
      const at::Tensor cu = at::tensor({int64_t{0}, int64_t{30}, N}, at::kLong), ones = at::ones({N});
      const auto [features, s] = g2rl::sequence_features(hidden, head, targets, cu, std::nullopt, std::nullopt, 0);
      const auto grads = g2rl::logprobs_backward(ones, ones, hidden, head, targets, s, 0, {true, true, false});
      return {features, s.logps, s.entropy, s.lse, grads[0], grads[1]};
    }
  };
  at::manual_seed(11);
  std::vector<Caller> callers;
  for (int i = 0; i < kCallers; ++i) {
    callers.push_back({at::randn({N, d}).to(dtype), at::randn({V, d}).to(dtype), at::randint(V, {N}, at::kLong), {}});
    callers.back().alone = callers.back().results();
  }
  std::vector<std::thread> threads;
  for (Caller& caller : callers)
    threads.emplace_back([&caller] {
      for (int round = 0; round < kRounds; ++round) {
        const std::vector<at::Tensor> found = caller.results();
        for (size_t i = 0; i < found.size(); ++i) caller.same &= at::equal(found[i], caller.alone[i]);
      }
    });
  for (std::thread& thread : threads) thread.join();
  for (const Caller& caller : callers) expect(caller.same, "callers with other bits", 1, 0);
}

// However much the workspace holds of the gradients of logits, and whichever of the results are asked for.
void check_strips(at::ScalarType dtype) {
  constexpr int64_t N = 700, d = 130, V = 4001;
  at::manual_seed(5);
  const at::Tensor hidden = (at::randn({N, d}) * 0.5).to(dtype), weight = at::randn({V, d}).to(dtype),
                   targets = at::randint(V, {N}, at::kLong), a = at::randn({N}), h = at::randn({N});
  const g2rl::Head head{weight, at::randn({V}), 0.9, 1.1, 0.0};
  const g2rl::TokenStats s = g2rl::token_logprobs(hidden, head, targets);
  const auto gradients = [&](int64_t workspace, g2rl::Needs needs) {
    return g2rl::logprobs_backward(a, h, hidden, head, targets, s, workspace, needs);
  };
  constexpr int64_t kLeast = 1, kAll = 1 << 30;
  const auto all = gradients(kAll, {true, true, true}), strips = gradients(kLeast, {true, true, true});
  const auto of_hidden = gradients(0, {true, false, false}), of_head = gradients(0, {false, true, true});
  // Beside the bias by strips, alone by its tokens on up to 5 threads.
  const auto beside_bias = gradients(0, {true, false, true});
  expect(at::equal(of_hidden[0], beside_bias[0]), "gradients of hidden alone have other bits", 1, 0);
  for (int i = 0; i < 3; ++i) {
    expect(at::equal(all[i], strips[i]), "strips change bits", i, 0);
    expect(at::equal(all[i], i == 0 ? of_hidden[i] : of_head[i]), "what is needed changes bits", i, 0);
  }
}

// Logits so far from 0 that their rounded maximum is less than one of them by more than the headroom of sums.
void check_huge(at::ScalarType dtype) {
  const at::Tensor hidden = at::tensor({2.421875, -0.84}, at::kDouble).view({2, 1}).to(dtype),
                   weight = at::tensor({-1.46, -2.25, -0.0014, -1.276}, at::kDouble).view({4, 1}).to(dtype),
                   targets = at::tensor({int64_t{2}, int64_t{1}}, at::kLong);
  const g2rl::TokenStats s = g2rl::token_logprobs(hidden, {weight, std::nullopt, 1e-10, 1.0, 0.0}, targets);
  for (const at::Tensor& x : {s.logps, s.entropy}) {
    const double most = x.abs().max().item<double>();
    expect(most == 0, "log p and entropy of the likeliest word", most, 0);
  }
}

// A target that the bias rules out leaves the results of the other words.
void check_impossible_target(at::ScalarType dtype) {
  at::manual_seed(3);
  const at::Tensor hidden = at::randn({5, 20}).to(dtype), weight = at::randn({300, 20}).to(dtype),
                   targets = at::full({5}, 7, at::kLong), others = at::cat({at::arange(7), at::arange(8, 300)});
  at::Tensor bias = at::zeros({300});
  bias[7] = -INFINITY;
  const g2rl::TokenStats s = g2rl::token_logprobs(hidden, {weight, bias, 1.0, 1.0, 0.0}, targets);
  const at::Tensor u = hidden.to(at::kDouble).mm(weight.to(at::kDouble).t()).index_select(1, others),
                   logp = u.log_softmax(1);
  const double of_lse = (s.lse - u.logsumexp(1)).abs().max().item<double>(),
               of_entropy = (s.entropy + (logp.exp() * logp).sum(1)).abs().max().item<double>();
  expect(of_lse <= 1e-5, "lse without the target", of_lse, 1e-5);
  expect(of_entropy <= 1e-5, "entropy without the target", of_entropy, 1e-5);
  expect(at::equal(s.logps, at::full({5}, -INFINITY)), "log p of the target", s.logps.max().item<double>(), -INFINITY);
}

}  // namespace

int main() try {
  for (const at::ScalarType dtype : {at::kBFloat16, at::kHalf, at::kFloat}) {
    check({70, 40, 301, dtype, 1.0, 1.0, 0.0, false});   // a block of tokens and a bit, ragged everything
    check({3, 1, 2, dtype, 1.0, 1.0, 0.0, false});       // the smallest head
    check({64, 64, 256, dtype, 0.7, 1.3, 0.0, true});    // exact tiles, bias
    check({65, 33, 257, dtype, 1.2, 0.8, 5.0, true});    // one past the tiles, a cap that saturates
    check({5, 700, 129, dtype, 1.0, -1.0, 0.0, false});  // hidden in two chunks, negative scale
    check_plans(dtype, dtype == at::kBFloat16);
    check_strips(dtype);
    check_callers(dtype);
    check_huge(dtype);
    check_impossible_target(dtype);
  }
  if (failures == 0) std::puts("all head tests passed");
  return failures != 0;
} catch (const c10::Error& error) {
  std::puts(error.what_without_backtrace());
  return 1;
}
