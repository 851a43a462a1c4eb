// The group kernel of csrc/cuda, on a CPU, against the formulas of MATH.md section 7 in float64.
#include "../cuda/groups.h"

#include <algorithm>
#include <random>
#include <string>
#include <vector>

#include "expect.h"

using namespace g2rl::cuda;

namespace {

void expect_close(double found, double expected, double limit, const std::string& what) {
  const double error = std::fabs(found - expected);
  const bool ok = error <= limit || (std::isnan(found) && std::isnan(expected));
  g2rl::testing::expect(ok, what + " is off", error, limit);
}

struct Batch {
  std::vector<int> cu{0};
  int d, m_max = 0;
  int64_t stride;
  std::vector<float> features, rewards;
  std::vector<uint8_t> valid;

  // Directions range from equal to unrelated, lengths over 30 decades; now and then a response has no features.
  Batch(const std::vector<int>& sizes, int d, uint32_t seed) : d(d), stride(d + 3) {
    std::mt19937 random(seed);
    std::normal_distribution<float> normal;
    for (const int m : sizes) {
      cu.push_back(cu.back() + m);
      m_max = std::max(m_max, m);
      std::vector<float> shared(d);
      for (float& x : shared) x = normal(random);
      for (int i = 0; i < m; ++i) {
        const float length = std::pow(10.f, float(int(random() % 30)) - 15), own = std::pow(10.f, -float(random() % 5));
        for (int k = 0; k < stride; ++k) {
          const float x = k < d ? length * (shared[k] + own * normal(random)) : NAN;
          features.push_back(i % 7 == 5 && k < d ? 0.f : x);
        }
        rewards.push_back(m % 2 ? (random() % 2 ? 1.f : -1.f) : 1.5f);
        valid.push_back(i % 6 != 4);
      }
    }
  }
};

struct Results {
  std::vector<float> advantages, shaped, scores, similarity;

  explicit Results(const Batch& b)
      : advantages(b.rewards.size(), NAN),
        shaped(advantages),
        scores(advantages),
        similarity((b.cu.size() - 1) * b.m_max * b.m_max, NAN) {}
  bool operator==(const Results&) const = default;
};

Results run(const Batch& b, const Shaping& shaping, bool with_valid) {
  Results r(b);
  g2rl_advantages({b.features.data(), b.rewards.data(), b.cu.data(), with_valid ? b.valid.data() : nullptr, b.stride,
                   int(b.cu.size()) - 1, b.d, b.m_max},
                  shaping, {r.advantages.data(), r.shaped.data(), r.scores.data(), r.similarity.data()}, nullptr);
  return r;
}

double dot(const Batch& b, int i, int j) {
  double sum = 0;
  for (int k = 0; k < b.d; ++k) sum += double(b.features[i * b.stride + k]) * b.features[j * b.stride + k];
  return sum;
}

void check_group(const Batch& b, int g, const Shaping& shaping, bool with_valid, const Results& found,
                 const std::string& what) {
  const int start = b.cu[g], m = b.cu[g + 1] - start;
  std::vector<double> S(m * m, 0), r(&b.rewards[start], &b.rewards[start] + m), nu(m, 0), shaped(r);
  std::vector<bool> usable(m);
  for (int i = 0; i < m; ++i) usable[i] = dot(b, start + i, start + i) != 0 && (!with_valid || b.valid[start + i]);
  for (int i = 0; i < b.m_max; ++i) {
    for (int j = 0; j < b.m_max; ++j) {
      double s = 0;
      if (i < m && j < m) {
        const double lengths = std::sqrt(dot(b, start + i, start + i)) * std::sqrt(dot(b, start + j, start + j));
        S[i * m + j] = s = lengths == 0 ? 0 : dot(b, start + i, start + j) / lengths;
      }
      expect_close(found.similarity[(size_t(g) * b.m_max + i) * b.m_max + j], s, 1e-7, what + ": similarity");
    }
  }
  double low = INFINITY, high = -INFINITY, lowest = INFINITY, highest = -INFINITY;
  for (int i = 0; i < m; ++i) {
    double total = 0, similar = 0;
    for (int j = 0; j < m; ++j) {
      if (j == i || !usable[j]) continue;
      total += std::exp(r[j]);
      similar += std::exp(r[j]) * S[i * m + j] * S[i * m + j];
    }
    if (usable[i] && total > 0) nu[i] = std::sqrt(std::max(1 - similar / total, 0.));
    if (!usable[i]) continue;
    low = std::min(low, nu[i]), high = std::max(high, nu[i]);
    lowest = std::min(lowest, r[i]), highest = std::max(highest, r[i]);
  }
  const bool keep = !(high > low) || high - low < shaping.min_range || (shaping.drop_uniform && lowest == highest);
  double mean = 0, variance = 0;
  for (int i = 0; i < m; ++i) {
    const double nubar = (nu[i] - low) / (high - low), strength = shaping.strength;
    const double factor = shaping.rule == Rule::scale      ? 1 + strength * nubar
                          : shaping.rule == Rule::centered ? 1 + strength * (2 * nubar - 1)
                                                           : 1 + strength * r[i] * nubar;
    const double bound = std::max(double(shaping.clip), std::abs(double(r[i])));
    if (!keep && usable[i]) shaped[i] = std::clamp(r[i] * factor, -bound, bound);
    mean += shaped[i] / m;
  }
  for (int i = 0; i < m; ++i) variance += std::pow(shaped[i] - mean, 2) / m;
  for (int i = 0; i < m; ++i) {
    const double unit = shaping.by_std ? std::sqrt(variance + 1e-6) : 1;
    // 1 - S^2 near 0 is known to 1e-15, its root to 3e-8; min-max divides by a span of min_range at least.
    expect_close(found.scores[start + i], nu[i], 1e-6, what + ": score");
    expect_close(found.shaped[start + i], shaped[i], 1e-5, what + ": shaped reward");
    expect_close(found.advantages[start + i], (shaped[i] - mean) / unit, 1e-5 / unit, what + ": advantage");
  }
}

// Sizes: none, alone, two, an odd one, a whole small tile, one more, three large tiles.
const std::vector<int> kSizes{0, 1, 2, 7, 16, 17, 70};

void test_rules() {
  for (const int d : {1, 63, 300}) {
    const Batch b(kSizes, d, 7);
    for (const Rule rule : {Rule::scale, Rule::centered, Rule::literal}) {
      for (const bool flag : {false, true}) {
        const Shaping shaping{0.8f, flag ? INFINITY : 1.2f, rule, 1e-2f, flag, !flag};
        const Results found = run(b, shaping, flag);
        const std::string what = "rule " + std::to_string(int(rule)) + ", d " + std::to_string(d);
        for (size_t g = 0; g < kSizes.size(); ++g) {
          check_group(b, int(g), shaping, flag, found, what + ", m " + std::to_string(kSizes[g]));
        }
        if (!(found == run(b, shaping, flag))) expect_close(1, 0, 0, what + ": other bits the second time");
      }
    }
  }
}

// A group has the same bits alone as between others, whatever the size of these.
void test_independence() {
  const Batch together({5, 16, 40}, 130, 3);
  Batch alone = together;
  alone.cu = {0, 16};
  alone.m_max = 16;
  alone.features.erase(alone.features.begin(), alone.features.begin() + 5 * alone.stride);
  alone.rewards.erase(alone.rewards.begin(), alone.rewards.begin() + 5);
  const Shaping shaping{1.f, 3.f, Rule::scale, 1e-2f, false, true};
  const Results one = run(alone, shaping, false), all = run(together, shaping, false);
  for (int i = 0; i < 16; ++i) {
    expect_close(one.advantages[i], all.advantages[5 + i], 0, "advantage of a group alone");
    expect_close(one.scores[i], all.scores[5 + i], 0, "score of a group alone");
  }
}

// NaN features show in their group's scores and rewards, and nowhere else. Rewards far apart do not overflow.
void test_extremes() {
  Batch b({4, 4}, 40, 5);
  b.features[2 * b.stride + 7] = NAN;
  for (int i = 0; i < 8; ++i) b.rewards[i] = i % 4 ? -900.f * (i % 4) : 900.f;
  const Shaping shaping{1.f, INFINITY, Rule::scale, 1e-2f, false, true};
  const Results found = run(b, shaping, false);
  for (int i = 0; i < 8; ++i) {
    const bool nan = i < 4;
    if (std::isnan(found.advantages[i]) != nan) expect_close(found.advantages[i], nan, 0, "NaN in advantages");
    if (std::isnan(found.scores[i]) != nan) expect_close(found.scores[i], nan, 0, "NaN in scores");
  }
}

}  // namespace

int main() {
  test_rules();
  test_independence();
  test_extremes();
  on_cpu::by_chance(1, test_rules);
  return g2rl::testing::outcome();
}
