// Kernels against double loops over the definitions, in every dtype and with every head option.
#include <chrono>
#include <exception>
#include <thread>

#include "../cpu/head_features.h"
#include "../cpu/tasks.h"
#include "cpu_problem.h"

namespace {

using namespace g2rl::testing;
using g2rl::Dtype;

struct Case {
  int64_t N, d, V;
  double temperature, scale, cap;
  bool bias;
};

struct Row {
  std::vector<double> residual;  // [V], (e_y - p) D
  double logp, entropy, lse;
};

Row row_by_definition(const float* h, const std::vector<float>& w, int64_t y, const Problem& c) {
  const int64_t V = c.V(), d = c.d();
  std::vector<double> u(V), slope(V, 1.0);
  double top = -INFINITY;
  for (int64_t v = 0; v < V; ++v) {
    double z = c.bias.empty() ? 0.0 : c.bias[v];
    for (int64_t i = 0; i < d; ++i) z += double(h[i]) * w[v * d + i];
    z *= c.logit_scale;
    if (c.softcap > 0) {
      slope[v] = 1 / std::pow(std::cosh(z / c.softcap), 2);
      z = c.softcap * std::tanh(z / c.softcap);
    }
    u[v] = z / c.temperature;
    top = std::max(top, u[v]);
  }
  double rest = 0, all = 0;
  for (int64_t v = 0; v < V; ++v) {
    all += std::exp(u[v] - top);
    if (v != y) rest += std::exp(u[v] - top);
  }
  const double lse = top + std::log(all);
  Row out{std::vector<double>(V), u[y] - lse, 0, lse};
  for (int64_t v = 0; v < V; ++v) {
    const double p = std::exp(u[v] - lse);
    if (p > 0) out.entropy -= p * (u[v] - lse);
    out.residual[v] = (v == y ? rest / all : -p) * slope[v];
  }
  return out;
}

std::vector<Row> rows_by_definition(const Problem& c) {
  const std::vector<float> h = c.hidden.values(), w = c.weight.values();
  std::vector<Row> rows;
  for (int64_t t = 0; t < c.N(); ++t) rows.push_back(row_by_definition(h.data() + t * c.d(), w, c.targets[t], c));
  return rows;
}

// Two parts of the vocabulary, the first of a single word, add up to the results of the whole.
void check_parts(const Problem& c, const Results& whole) {
  const int64_t N = c.N(), bounds[] = {0, 1, c.V()};
  std::vector<float> sums(4 * 2 * N), of_part(4 * N), total(whole.features.size());
  std::vector<int64_t> local[2];
  const auto tokens = [&](int i) { return g2rl::Tokens{c.tokens().hidden, local[i].data()}; };
  for (int i = 0; i < 2; ++i) {
    for (const int64_t y : c.targets) local[i].push_back(y >= bounds[i] && y < bounds[i + 1] ? y - bounds[i] : -1);
    g2rl::token_sums(tokens(i), c.head(bounds[i], bounds[i + 1]), of_part.data());
    for (int64_t row = 0; row < 4; ++row) std::copy_n(of_part.data() + row * N, N, sums.data() + (row * 2 + i) * N);
  }
  for (int i = 0; i < 2; ++i) {
    Results share = c.empty();
    g2rl::part_features(tokens(i), c.head(bounds[i], bounds[i + 1]), c.batch(), sums.data(), 2, 0,
                        share.features.data(), share.stats());
    for (size_t j = 0; j < total.size(); ++j) total[j] += share.features[j];
    const double error = difference(share.logps, whole.logps);
    expect(error <= 1e-5, "log p of parts", error, 1e-5);
  }
  double error = 0, norm = 0;
  for (size_t j = 0; j < total.size(); ++j) {
    error += std::pow(double(total[j]) - whole.features[j], 2);
    norm += std::pow(double(whole.features[j]), 2);
  }
  expect(std::sqrt(error) <= 1e-5 * std::sqrt(norm), "features of parts", std::sqrt(error), 1e-5 * std::sqrt(norm));
}

void check_tokens(const std::vector<Row>& rows, const Results& found) {
  for (size_t t = 0; t < rows.size(); ++t) {
    const double logp = std::abs(found.logps[t] - rows[t].logp), entropy = std::abs(found.entropy[t] - rows[t].entropy);
    expect(logp <= 1e-5, "log p", logp, 1e-5);
    expect(entropy <= 1e-5, "entropy", entropy, 1e-5);
  }
}

void check_features(const Problem& c, const std::vector<Row>& rows, const Results& found) {
  const int64_t d = c.d(), V = c.V();
  const std::vector<float> w = c.weight.values();
  for (int64_t b = 0; b < c.B(); ++b) {
    const int64_t begin = c.cu_seqlens[b], end = c.cu_seqlens[b + 1];
    double sum = 0, error = 0, norm = 0;
    for (int64_t t = begin; t < end; ++t) sum += c.token_weights[t];
    for (int64_t i = 0; i < d; ++i) {
      double phi = 0;
      for (int64_t t = begin; t < end; ++t)
        for (int64_t v = 0; v < V; ++v)
          phi += c.logit_scale * c.token_weights[t] / sum * rows[t].residual[v] * w[v * d + i];
      error += std::pow(found.features[b * d + i] - phi, 2);
      norm += phi * phi;
    }
    expect(std::sqrt(error) <= 1e-5 * std::sqrt(norm), "features", std::sqrt(error), 1e-5 * std::sqrt(norm));
  }
}

// A gradient of hidden is linear in residuals: with one of log p alone upstream it is scale / T * W^T residual.
void check_dhidden(const Problem& c, const std::vector<Row>& rows, Results& saved, Dtype dtype) {
  const int64_t N = c.N(), d = c.d(), V = c.V();
  const std::vector<float> ones(N, 1.0f), zeros(N), w = c.weight.values();
  const std::vector<float> dhidden = c.gradients(ones, zeros, saved, 0, {true, true, !c.bias.empty()}).hidden.values();
  double error = 0, norm = 0;
  for (int64_t t = 0; t < N; ++t)
    for (int64_t i = 0; i < d; ++i) {
      double expected = 0;
      for (int64_t v = 0; v < V; ++v) expected += c.logit_scale / c.temperature * rows[t].residual[v] * w[v * d + i];
      error += std::pow(dhidden[t * d + i] - expected, 2);
      norm += expected * expected;
    }
  const double tolerance = dtype == Dtype::kFloat  ? 1e-5
                           : dtype == Dtype::kHalf ? 1e-3
                                                   : 6e-3;  // a rounding of the output and one of g
  expect(std::sqrt(error / norm) <= tolerance, "dhidden", std::sqrt(error / norm), tolerance);
}

void check(Dtype dtype, const Case& of) {
  const auto [N, d, V, temperature, scale, cap, bias] = of;
  Random random(static_cast<unsigned>(N + d));
  Problem c{.hidden = Numbers(dtype, d, normal(N * d, random)),
            .weight = Numbers(dtype, d, normal(V * d, random, 0.3f)),
            .targets = words(N, V, random),
            .cu_seqlens = {0, N / 3, N / 3, N},  // the middle response is empty
            .token_weights = positive(N, random),
            .bias = {},
            .temperature = temperature,
            .logit_scale = scale,
            .softcap = cap};
  const std::vector<float> drawn = normal(V, random);
  if (bias) c.bias.assign(drawn.begin(), drawn.end());

  Results found = c.sequence_features();
  const Results one_pass = c.sequence_features(0, found.lse.data());
  const Results twice = c.sequence_features(/*workspace_bytes=*/1);
  expect(found == twice, "bits where nothing is kept", 1, 0);
  check_parts(c, found);
  const std::vector<Row> rows = rows_by_definition(c);
  for (const Results& results : {found, one_pass}) {
    check_tokens(rows, results);
    check_features(c, rows, results);
  }
  check_dhidden(c, rows, found, dtype);
}

// The plan with one product, in one block of tokens and in several, which must agree with two products to the bit,
// responses across blocks, empty and of one token included.
void check_plans(Dtype dtype, bool bias) {
  constexpr int64_t N = 3000, d = 64, V = 4001;
  Random random(7);
  Problem c{.hidden = Numbers(dtype, d, normal(N * d, random, 0.5f)),
            .weight = Numbers(dtype, d, normal(V * d, random)),
            .targets = words(N, V, random),
            .cu_seqlens = {0, 1, 1, 250, 777, N},
            .token_weights = positive(N, random),
            .bias = {},
            .temperature = 0.9,
            .logit_scale = 1.1};
  const std::vector<float> drawn = normal(V, random);
  if (bias) c.bias.assign(drawn.begin(), drawn.end());
  constexpr int64_t kSome = N * V / 2, kPlenty = 1 << 30, kNone = 1;
  const g2rl::KeptPlan plan =
      g2rl::plan_kept(g2rl::HeadProblem(c.tokens(), c.head()), {c.cu_seqlens.data(), nullptr, 0, c.B()}, kSome);
  expect(plan.tokens > 0 && plan.tokens < N, "tokens per block", plan.tokens, N);
  const Results twice = c.sequence_features(kNone);
  for (const int64_t workspace : {kSome, kPlenty}) {
    const Results kept = c.sequence_features(workspace);
    expect(kept.features == twice.features, "features of both plans", difference(kept.features, twice.features), 0);
    expect(kept.logps == twice.logps && kept.entropy == twice.entropy, "statistics of both plans", 1, 0);
  }
}

// Several callers at once, each with the bits that it gets alone: nothing is shared that calls write to.
void check_callers(Dtype dtype) {
  constexpr int64_t N = 70, d = 33, V = 700;
  constexpr int kCallers = 8, kRounds = 3;
  struct Caller {
    Problem problem;
    bool same = true;
    Results alone{};
    GradientsOf gradients_alone{};

    std::pair<Results, GradientsOf> results() const {
      const std::vector<float> ones(N, 1.0f);
      Results found = problem.sequence_features();
      GradientsOf gradients = problem.gradients(ones, ones, found, 0, {true, true, false});
      return {std::move(found), std::move(gradients)};
    }
  };
  Random random(11);
  std::vector<Caller> callers;
  for (int i = 0; i < kCallers; ++i) {
    callers.push_back({{.hidden = Numbers(dtype, d, normal(N * d, random)),
                        .weight = Numbers(dtype, d, normal(V * d, random)),
                        .targets = words(N, V, random),
                        .cu_seqlens = {0, 30, N},
                        .token_weights = {},
                        .bias = {},
                        .temperature = 0.9,
                        .logit_scale = 1.1,
                        .softcap = 5.0}});
    std::tie(callers.back().alone, callers.back().gradients_alone) = callers.back().results();
  }
  std::vector<std::thread> threads;
  for (Caller& caller : callers)
    threads.emplace_back([&caller] {
      for (int round = 0; round < kRounds; ++round) {
        const auto [found, gradients] = caller.results();
        caller.same &= found == caller.alone && gradients.hidden == caller.gradients_alone.hidden &&
                       gradients.weight == caller.gradients_alone.weight;
      }
    });
  for (std::thread& thread : threads) thread.join();
  for (const Caller& caller : callers) expect(caller.same, "callers with other bits", 1, 0);
}

// However much the workspace holds of the gradients of logits, and whichever of the results are asked for.
void check_strips(Dtype dtype) {
  constexpr int64_t N = 700, d = 130, V = 4001;
  Random random(5);
  Problem c{.hidden = Numbers(dtype, d, normal(N * d, random, 0.5f)),
            .weight = Numbers(dtype, d, normal(V * d, random)),
            .targets = words(N, V, random),
            .cu_seqlens = {0, N},
            .token_weights = {},
            .bias = {},
            .temperature = 0.9,
            .logit_scale = 1.1};
  const std::vector<float> a = normal(N, random), h = normal(N, random), bias = normal(V, random);
  c.bias.assign(bias.begin(), bias.end());
  Results saved = c.token_logprobs();
  const auto gradients = [&](int64_t workspace, Problem::Needs needs) {
    return c.gradients(a, h, saved, workspace, needs);
  };
  constexpr int64_t kLeast = 1, kAll = 1 << 30;
  const GradientsOf all = gradients(kAll, {true, true, true}), strips = gradients(kLeast, {true, true, true});
  const GradientsOf of_hidden = gradients(0, {true, false, false}), of_head = gradients(0, {false, true, true});
  // Beside the bias by strips, alone by its tokens on up to 5 threads.
  const GradientsOf beside_bias = gradients(0, {true, false, true});
  expect(of_hidden.hidden == beside_bias.hidden, "gradients of hidden alone have other bits", 1, 0);
  expect(all.hidden == strips.hidden && all.weight == strips.weight && all.bias == strips.bias, "strips change bits", 1,
         0);
  expect(all.hidden == of_hidden.hidden && all.weight == of_head.weight && all.bias == of_head.bias,
         "what is needed changes bits", 1, 0);
}

// With few tokens threads share strips and columns; with any number of them the bits are the same.
void check_threads(Dtype dtype) {
  Random random(9);
  for (const int64_t N : {3, 70, 500}) {
    constexpr int64_t d = 330, V = 4001;
    const Problem c{.hidden = Numbers(dtype, d, normal(N * d, random, 0.5f)),
                    .weight = Numbers(dtype, d, normal(V * d, random)),
                    .targets = words(N, V, random),
                    .cu_seqlens = {0, N},
                    .token_weights = {},
                    .bias = {}};
    const std::vector<float> a = normal(N, random), h = normal(N, random);
    const auto results = [&](int threads) {
      const g2rl::Threads of_call(threads);
      Results found = c.sequence_features();
      GradientsOf gradients = c.gradients(a, h, found, 0, {true, true, false});
      return std::pair(std::move(found), std::move(gradients));
    };
    const auto [found, gradients] = results(1);
    for (const int threads : {2, 5, 13}) {
      const auto [others, of_others] = results(threads);
      expect(others == found, "threads change features or statistics", threads, 1);
      expect(of_others.hidden == gradients.hidden, "threads change gradients of hidden", threads, 1);
      expect(of_others.weight == gradients.weight, "threads change gradients of the weight", threads, 1);
    }
  }
}

// A task that fails tells the caller, whichever thread it was on, and leaves threads as they were.
void check_errors() {
  constexpr int64_t kTasks = 64;
  for (const int threads : {1, 5}) {
    const g2rl::Threads of_call(threads);
    for (int64_t wrong = 0; wrong < kTasks; ++wrong) {
      bool told = false;
      try {
        g2rl::for_tasks(
            kTasks, [] { return 0; },
            [&](int, int64_t task) {
              if (task == wrong) throw std::bad_alloc();
            });
      } catch (const std::bad_alloc&) {
        told = true;
      }
      expect(told, "an error that is lost", wrong, kTasks);
    }
    std::atomic<int> flushing{0};
    g2rl::on_threads(threads, [&] {
      volatile float smallest = 0x1p-130f, half = 0.5f;
      flushing += smallest * half == 0;
    });
    expect(flushing == 0, "threads that flush subnormals ever after", flushing, 0);
  }
}

// Phases come one after the other, tell of a task that fails, and go on without a thread that has no task.
void check_phases() {
  constexpr int64_t kTasks = 3, kPhases = 50;
  const std::vector<int64_t> tasks(kPhases, kTasks);
  for (const int threads : {1, 2, 5}) {
    const g2rl::Threads of_call(threads);
    std::atomic<int64_t> ended{0}, early{0};
    g2rl::for_phases(
        tasks, [] { return 0; },
        [&](int, size_t phase, int64_t) {
          early += ended < int64_t(phase) * kTasks;
          ++ended;
        });
    expect(early == 0, "tasks before the phase before them has ended", early, 0);
    expect(ended == kTasks * kPhases, "tasks of all phases", ended, kTasks * kPhases);
    for (const size_t wrong : {size_t(0), size_t(kPhases - 1)}) {
      bool told = false;
      try {
        g2rl::for_phases(
            tasks, [] { return 0; },
            [&](int, size_t phase, int64_t task) {
              if (phase == wrong && task == 1) throw std::bad_alloc();
            });
      } catch (const std::bad_alloc&) {
        told = true;
      }
      expect(told, "an error of a phase that is lost", wrong, kPhases);
    }
  }
  // As one is that waits for a processor: ready only when all is done, or after ten seconds.
  const g2rl::Threads of_call(2);
  std::atomic<int64_t> ready{0}, ended{0}, late{0};
  g2rl::for_phases(
      tasks,
      [&] {
        if (ready++ == 0) return 0;
        for (int i = 0; ended < kTasks * kPhases && i < 10'000; ++i)
          std::this_thread::sleep_for(std::chrono::milliseconds(1));
        late += ended < kTasks * kPhases;
        return 0;
      },
      [&](int, size_t, int64_t) { ++ended; });
  expect(late == 0, "phases that wait for a thread without a task", late, 0);
}

// Logits so far from 0 that their rounded maximum is less than one of them by more than the headroom of sums.
void check_huge(Dtype dtype) {
  const Problem c{.hidden = Numbers(dtype, 1, {2.421875f, -0.84f}),
                  .weight = Numbers(dtype, 1, {-1.46f, -2.25f, -0.0014f, -1.276f}),
                  .targets = {2, 1},
                  .cu_seqlens = {0, 2},
                  .token_weights = {},
                  .bias = {},
                  .temperature = 1e-10};
  const Results found = c.token_logprobs();
  const std::vector<float> zeros(2);
  for (const std::vector<float>* x : {&found.logps, &found.entropy})
    expect(*x == zeros, "log p and entropy of the likeliest word", difference(*x, zeros), 0);
}

// A target that the bias rules out leaves the results of the other words.
void check_impossible_target(Dtype dtype) {
  constexpr int64_t N = 5, d = 20, V = 300;
  Random random(3);
  Problem c{.hidden = Numbers(dtype, d, normal(N * d, random)),
            .weight = Numbers(dtype, d, normal(V * d, random)),
            .targets = std::vector<int64_t>(N, 7),
            .cu_seqlens = {0, N},
            .token_weights = {},
            .bias = std::vector<double>(V)};
  c.bias[7] = -INFINITY;
  const Results found = c.token_logprobs();
  const std::vector<Row> rows = rows_by_definition(c);
  for (int64_t t = 0; t < N; ++t) {
    const double lse = std::abs(found.lse[t] - rows[t].lse), entropy = std::abs(found.entropy[t] - rows[t].entropy);
    expect(lse <= 1e-5, "lse without the target", lse, 1e-5);
    expect(entropy <= 1e-5, "entropy without the target", entropy, 1e-5);
    expect(found.logps[t] == -INFINITY, "log p of the target", found.logps[t], -INFINITY);
  }
}

}  // namespace

int main() try {
  for (const Dtype dtype : {Dtype::kBFloat16, Dtype::kHalf, Dtype::kFloat}) {
    check(dtype, {70, 40, 301, 1.0, 1.0, 0.0, false});   // a block of tokens and a bit, ragged everything
    check(dtype, {3, 1, 2, 1.0, 1.0, 0.0, false});       // the smallest head
    check(dtype, {64, 64, 256, 0.7, 1.3, 0.0, true});    // exact tiles, bias
    check(dtype, {65, 33, 257, 1.2, 0.8, 5.0, true});    // one past the tiles, a cap that saturates
    check(dtype, {5, 700, 129, 1.0, -1.0, 0.0, false});  // hidden in two chunks, negative scale
    check_plans(dtype, dtype == Dtype::kBFloat16);
    check_strips(dtype);
    check_threads(dtype);
    check_callers(dtype);
    check_huge(dtype);
    check_impossible_target(dtype);
  }
  check_errors();
  check_phases();
  return outcome();
} catch (const std::exception& error) {
  std::puts(error.what());
  return 1;
}
