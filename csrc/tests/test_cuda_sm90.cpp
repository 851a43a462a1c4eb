// The Hopper kernels of csrc/cuda, on a CPU, against float64: rings of stages, TMA and wgmma included.
#include "cuda_problem.h"

using namespace g2rl::cuda;
using namespace g2rl::cuda::testing;

namespace {

// Memory for `Kept` of so many tokens, NaN where nobody writes.
struct OwnKept {
  int64_t stride;
  int roots_of;
  Floats rows;

  OwnKept(const Head& head, int N)
      : stride(sm90::kept_bytes(head)), roots_of(sm90::kept_roots(head)), rows(N * stride / 4, NAN) {}
  operator Kept() { return {rows.data(), stride, roots_of}; }
  const float* row(int n) const { return &rows[n * stride / 4]; }
};

struct Forward {
  Floats results, R;
  OwnKept kept;
  OwnTerms terms;

  explicit Forward(Problem& p, bool keep = true)
      : results(3 * size_t(p.N), NAN), R(size_t(p.B) * p.c.V, NAN), kept(p.head(), keep ? p.N : 0), terms(p.N) {
    const Partials partials{nullptr, sm90::splits(p.c.V)};
    Floats planes(4 * size_t(partials.splits) * p.N, NAN);
    sm90::statistics(p.head(), p.tokens(), {planes.data(), partials.splits}, keep ? Kept(kept) : Kept{}, nullptr);
    merge(p.head(), {planes.data(), partials.splits}, p.N, nullptr, p.a.data(), results.data(), p.N, terms.terms,
          nullptr);
    std::vector<int> packing(packing_bytes(p.N, p.B) / sizeof(int));
    sm90::residuals(p.head(), p.tokens(), p.responses(), terms.terms, nullptr, packing.data(), R.data(), nullptr);
  }
};

// What is kept of a token: raw logits, or roots with a reference for each tile.
void check_kept(Problem& p, const OwnKept& kept, int n, const std::string& at) {
  const int V = p.c.V, of = kept.roots_of;
  const double* z = &p.z[size_t(n) * V];
  if (of == 0) {
    for (int v = 0; v < V; ++v) expect_below(std::fabs(kept.row(n)[v] - z[v]), 1e-5 * (1 + std::fabs(z[v])), at);
    return;
  }
  const auto* roots = reinterpret_cast<const uint16_t*>(kept.row(n));
  const auto* references = reinterpret_cast<const float*>(roots + ceil_div(V, of) * of);
  for (int first = 0; first < V; first += of) {
    double largest = kNoMaximum;
    const auto t = [&](int v) { return p.head().scale * z[v] / std::log(2.0); };
    for (int v = first; v < std::min(V, first + of); ++v) {
      if (v != p.targets[n]) largest = std::max(largest, t(v));
    }
    const double reference = references[first / of];
    expect_below(std::fabs(reference - largest), 1e-5 * (1 + std::fabs(largest)), at + ": reference");
    for (int v = first; v < std::min(V, first + of); ++v) {
      const int within = v % 32, place = v / 32 * 32 + within % 8 / 2 * 8 + within / 8 * 2 + within % 2;
      const double root = v == p.targets[n] ? 0 : std::exp2(0.5 * (t(v) - reference));
      expect_below(std::fabs(roots[place] / 65535. - root), 0.51 / 65535 + 1e-5 * root, at + ": root");
    }
  }
}

void check(Problem& p, const Forward& f, const std::string& what) {
  check_tokens(p, f.results, what);
  for (int n = 0; n < p.N && !f.kept.rows.empty(); ++n) {
    check_kept(p, f.kept, n, what + ", token " + std::to_string(n) + ": kept");
  }
  check_rows(p, f.R, p.R, p.c.V, what + ", R");
}

void test_gradients(Problem& p, const std::string& what) {
  const int N = p.N, first = 1, last = p.c.V - 2;
  const bool scaled = p.c.dtype == Dtype::fp16;
  Floats rows(6 * size_t(N));
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  for (int n = 0; n < N; ++n) {
    const double g = normal(random), g_entropy = normal(random), p_y = std::exp(p.log_p[n]);
    const double values[6] = {
        p.lse[n], p.entropy[n], g, g_entropy, g * (1 - p_y) - g_entropy * p_y * (p.log_p[n] + p.entropy[n]), 512};
    for (int i = 0; i < 6; ++i) rows[size_t(i) * N + n] = float(values[i]);
  }
  const int64_t stride = last - first + 3;
  const float even_scale = 64;
  Numbers G(p.c.dtype, N * stride), G_even(p.c.dtype, N * stride);
  const Strip strip{G.data(), scaled ? G_even.data() : nullptr, &even_scale, stride, first, last};
  sm90::grad_logits(p.head(), p.tokens(), rows.data(), N, strip, nullptr);
  const double unit = scaled ? 0x1p-11 : 0x1p-8;
  for (int n = 0; n < N; ++n) {
    for (int v = first; v < last; ++v) {
      const size_t i = size_t(n) * p.c.V + v;
      const double log_p = std::log(p.p[i]), g = rows[2 * N + n], g_entropy = rows[3 * N + n];
      const double others = -p.p[i] * (g + g_entropy * (log_p + p.entropy[n]));
      const double expected = (v == p.targets[n] ? rows[4 * N + n] : others) * p.slope[i];
      const double limit = 1.01 * unit * std::fabs(expected) + 2e-6 + (scaled ? 0x1p-25 : 0);
      const std::string at = what + ", gradient of token " + std::to_string(n) + " at " + std::to_string(v);
      const size_t to = n * stride + v - first;
      expect_below(std::fabs(G[to] / (scaled ? 512 : 1) - expected), limit, at);
      if (scaled) expect_below(std::fabs(G_even[to] / 64 - expected), limit, at + ", even");
    }
    for (int64_t i = last - first; i < stride; ++i) expect(std::isnan(G[n * stride + i]), "beyond the strip", 0, 0);
  }
}

// Tokens in chunks: no other bits of log p, and R from what is kept.
void test_kept(Problem& p, const Forward& expected, int chunk, const std::string& what) {
  Floats R(expected.R.size(), 0.f);
  OwnTerms terms(p.N);
  OwnKept kept(p.head(), chunk);
  OwnCarry carry(p.c.V);
  const int splits = sm90::splits(p.c.V);
  Floats planes(4 * size_t(splits) * chunk, NAN), results(3 * size_t(p.N), NAN);
  for (int first = 0; first < p.N; first += chunk) {
    const int last = std::min(first + chunk, p.N);
    const Tokens tokens{p.hidden.data() + first * p.stride * p.hidden.size(), p.targets.data() + first, p.stride,
                        last - first};
    sm90::statistics(p.head(), tokens, {planes.data(), splits}, kept, nullptr);
    merge(p.head(), {planes.data(), splits}, tokens.N, nullptr, p.a.data() + first, results.data() + first, p.N,
          terms.from(first), nullptr);
    add_kept(p.head(), kept, p.targets.data(), p.responses(), terms.from(first), carry.next(), first, last, R.data(),
             nullptr);
  }
  expect(results == expected.results, what + ": chunks change bits", 1, 0);
  check_rows(p, R, p.R, p.c.V, what + ", R from what was kept,");
}

// With an lse given: statistics out of the same product, R without targets until the flags are known; and what is
// flagged, recomputed alone.
struct Given {
  Floats results, R;
  OwnTerms terms;
  std::vector<int> flags;

  Given(Problem& p, const Floats& lse)
      : results(3 * size_t(p.N), NAN), R(size_t(p.B) * p.c.V, NAN), terms(p.N), flags(p.B) {
    const Partials partials{nullptr, sm90::residual_splits(p.c.V)};
    Floats planes(4 * size_t(partials.splits) * p.N, NAN), inverse(p.B);
    std::vector<int> packing(packing_bytes(p.N, p.B) / sizeof(int));
    sm90::residuals_and_statistics(p.head(), p.tokens(), p.responses(), lse.data(), p.a.data(), packing.data(),
                                   R.data(), {planes.data(), partials.splits}, nullptr);
    merge(p.head(), {planes.data(), partials.splits}, p.N, lse.data(), p.a.data(), results.data(), p.N, terms.terms,
          nullptr);
    responses(p.responses(), p.a.data(), terms.terms.S, lse.data(), inverse.data(), flags.data(), nullptr);
    sm90::residuals(p.head(), p.tokens(), p.responses(), terms.terms, flags.data(), packing.data(), R.data(), nullptr);
    add_targets(p.targets.data(), p.N, p.responses(), terms.terms, flags.data(), p.c.V, R.data(), nullptr);
  }
};

void test_given_lse(Problem& p, const std::string& what) {
  Floats lse(p.lse.begin(), p.lse.end());
  const int wrong = p.B - 1;
  for (int n = p.cu[wrong]; n < p.N; ++n) lse[n] += 1e-4f * std::max(1.f, std::fabs(lse[n]));
  const Given given(p, lse);
  expect(given.flags[wrong] == 1, what + ": a wrong lse is not flagged", 0, 1);
  check_tokens(p, given.results, what + ", lse given");
  check_rows(p, given.R, p.R, p.c.V, what + ", lse given, R");
}

void test_sure_tokens() {
  Problem p = sure_tokens(Dtype::bf16);
  const Given given(p, Floats(p.lse.begin(), p.lse.end()));
  expect(given.flags == std::vector<int>(p.B, 0), "sure tokens: their lse was not believed", 1, 0);
  check_rows(p, given.R, p.R, p.c.V, "sure tokens");
}

void test_case(const Case& c, const std::string& what) {
  Problem p(c);
  const Forward once(p), again(p);
  check(p, once, what);
  check(p, Forward(p, false), what + ", nothing kept");
  expect(once.results == again.results && once.R == again.R, what + ": twice, other bits", 1, 0);
  test_kept(p, once, 96, what);
  test_gradients(p, what);
  test_given_lse(p, what);
}

// A response's bits depend on nothing else in its batch, nor does a NaN leave its response.
void test_neighbours() {
  Problem p({{37, 130, 5}, 136, 400});
  const Floats lse(p.lse.begin(), p.lse.end());
  const Forward before(p);
  const Given given_before(p, lse), again(p, lse);
  expect(given_before.results == again.results && given_before.R == again.R, "lse given, twice, other bits", 1, 0);
  Problem moved({{37, 130, 5}, 136, 400});
  const int first = moved.cu[1], last = moved.cu[2];
  for (int n = 0; n < moved.N; ++n) {
    if (n < first || n >= last) moved.hidden.set(n * moved.stride + 7, n % 2 ? NAN : 3.f);
  }
  const Forward after(moved);
  const Given given_after(moved, lse);
  const auto same_R = [&](const Floats& x, const Floats& y) {
    return std::equal(x.begin() + p.c.V, x.begin() + 2 * p.c.V, y.begin() + p.c.V);
  };
  expect(same_R(before.R, after.R) && same_R(given_before.R, given_after.R), "R depends on other responses", 1, 0);
  const auto same_tokens = [&](const Floats& x, const Floats& y) { return std::equal(&x[first], &x[last], &y[first]); };
  expect(same_tokens(before.results, after.results) && same_tokens(given_before.results, given_after.results),
         "log p depends on other tokens", 1, 0);
  for (const Floats* R : {&after.R, &given_after.R}) expect(std::isnan((*R)[0]), "a NaN does not show", 0, 1);
  expect(std::isnan(after.results[1]) && std::isnan(given_after.results[1]), "a NaN does not show", 0, 1);
}

// Nor on where it lies: the same response alone.
void test_place() {
  Problem p({{37, 130, 5}, 136, 400}), alone({{130}, 136, 400});
  const int first = p.cu[1];
  for (int n = 0; n < alone.N; ++n) {
    for (int k = 0; k < p.c.d; ++k) alone.hidden.set(n * alone.stride + k, float(p.hidden[(first + n) * p.stride + k]));
    alone.targets[n] = p.targets[first + n], alone.a[n] = p.a[first + n];
  }
  for (int v = 0; v < p.c.V; ++v) {
    for (int k = 0; k < p.c.d; ++k) alone.weight.set(v * alone.stride + k, float(p.weight[v * p.stride + k]));
  }
  const Floats lse(p.lse.begin(), p.lse.end()), lse_alone(lse.begin() + first, lse.begin() + first + alone.N);
  const Given in_batch(p, lse), by_itself(alone, lse_alone);
  const bool R = std::equal(by_itself.R.begin(), by_itself.R.end(), in_batch.R.begin() + p.c.V);
  const bool log_p = std::equal(&by_itself.results[0], &by_itself.results[alone.N], &in_batch.results[first]);
  expect(R && log_p, "lse given: a response's bits depend on its place", 1, 0);
}

void test_long_response() {
  const Problem p({{8192}, 8, 40});
  check_long_response(p, of_statistics(sm90::residuals), "residuals");
  check_long_response(p, of_given_lse(sm90::residuals_and_statistics, sm90::residual_splits(40)), "lse given");
}

// As many tokens as are cut in ranges, which blocks take one after another, of more responses than are packed at once.
void test_ranges() {
  Problem p({std::vector<int>(600, 7), 384, 40});
  check(p, Forward(p, false), "ranges");
  test_given_lse(p, "ranges");
}

// A chip may let any thread be the last: here one of the copying warp, of those beside it and of those that multiply.
void test_slow_threads() {
  for (const unsigned thread : {1u, 40u, 200u}) {
    on_cpu::state().slow = thread;
    test_case({{3, 129}, 584, 200}, "slow thread " + std::to_string(thread));
  }
  on_cpu::state().slow = ~0u;
}

// What takes little time where every access is watched.
void test_for_races() {
  test_case({{5, 0, 1, 17, 130}, 136, 805}, "ragged");
  test_case({{3, 29}, 72, 100, Dtype::fp16, true}, "fp16");
  test_ranges();
  test_case({{3, 29}, 72, 100, Dtype::bf16, true, 5}, "soft cap");
  on_cpu::by_chance(1, [] { test_case({{3, 29}, 72, 200}, "by chance"); });
}

}  // namespace

int main() {
  if (on_cpu::races::kWatched) {
    test_for_races();
    return outcome();
  }
  test_case({{5, 0, 1, 17, 130}, 136, 1105}, "ragged");
  test_case({{200, 193}, 64, 3300, Dtype::fp16, true, 0, 0.7, 1.3}, "fp16, bias, scale, temperature");
  test_case({{3, 129}, 584, 200, Dtype::bf16, true, 5}, "soft cap");
  test_case({{40}, 72, 100, Dtype::fp16, false, 0, -1}, "one tile, negative scale");
  test_neighbours();
  test_place();
  test_sure_tokens();
  test_long_response();
  test_ranges();
  test_slow_threads();
  on_cpu::by_chance(3, [] { test_case({{3, 129}, 584, 200}, "by chance"); });
  return outcome();
}
