// The exponential's accuracy and the layouts, for the instruction set in use.
#include <algorithm>
#include <cmath>
#include <exception>
#include <limits>
#include <vector>

#include "../cpu/isa.h"
#include "../cpu/rowwise.h"
#include "expect.h"

int main() try {
  const g2rl::RowKernels& k = g2rl::rowwise();
  const std::string isa = std::string(" (") + g2rl::isa_name(g2rl::isa()) + ")";
  const auto expect = [&](bool ok, const char* what, double found, double limit) {
    g2rl::testing::expect(ok, what + isa, found, limit);
  };

  constexpr int kWidth = 1 << 16;
  std::vector<float> x(kWidth), sum(16), sum_x(16);
  for (int i = 0; i < kWidth; ++i) x[i] = -80.0f * i / kWidth;
  std::vector<float> e = x;
  const float zero = 0, one = 1;
  k.gradient({.tile = {e.data(), kWidth, 1, kWidth, kWidth}, .lse = &zero, .c0 = &one, .c1 = &zero}, {});
  double worst = 0;
  for (int i = 0; i < kWidth; ++i)
    worst = std::max(worst, std::abs(e[i] / std::exp(static_cast<double>(x[i])) - 1) - 3e-9 * std::abs(x[i]));
  expect(worst < 1.5e-7, "exp relative error", worst, 1.5e-7);

  const auto lane_sum = [&](const std::vector<float>& lanes) {
    float of_lanes = 0;
    k.lane_sums(lanes.data(), 1, &of_lanes);
    return of_lanes;
  };
  float ref = 0;
  const auto add_row = [&](std::vector<float> row, bool first, float alpha = 1) {
    const int width = static_cast<int>(row.size());
    k.stats({.tile = {row.data(), width, 1, width, width},
             .alpha = alpha,
             .first = first,
             .ref = &ref,
             .sum = sum.data(),
             .sum_x = sum_x.data()},
            {}, {});
  };
  const auto stats = [&](float fill, bool first, float alpha = 1) {
    add_row(std::vector<float>(g2rl::kUnit, fill), first, alpha);
  };
  for (const float alpha : {1.0f, 1e30f}) {
    stats(-std::numeric_limits<float>::infinity(), true, alpha);
    expect(std::isfinite(lane_sum(sum)) && std::isfinite(lane_sum(sum_x)), "fully masked tile", lane_sum(sum),
           INFINITY);
    stats(2.0f, false, alpha);
    expect(ref == 2.0f * alpha && std::abs(lane_sum(sum) - g2rl::kUnit) < 1e-5 && std::abs(lane_sum(sum_x)) < 1e-5,
           "tile after a fully masked one", lane_sum(sum), g2rl::kUnit);
  }

  // A later tile far above the first moves the reference.
  stats(-100.0f, true);
  stats(100.0f, false);
  expect(ref == 100.0f && std::abs(lane_sum(sum) - g2rl::kUnit) < 1e-5, "moved reference", lane_sum(sum), g2rl::kUnit);

  // As it does above words that a bias masks: of so many as there may be, each is to count for nothing.
  stats(-1e30f, true);
  stats(2.0f, false);
  expect(lane_sum(sum) == g2rl::kUnit && lane_sum(sum_x) == 0, "tile after one of masked words", lane_sum(sum_x), 0);

  // A later column of the first tile does so, too, whose reference is looked for in its first kUnit columns alone.
  const auto two_units = [&](float first, float second) {
    std::vector<float> row(2 * g2rl::kUnit, first);
    std::fill(row.begin() + g2rl::kUnit, row.end(), second);
    add_row(row, true);
  };
  for (const float low : {-100.0f, -1e30f, -std::numeric_limits<float>::infinity()}) {
    two_units(low, 2.0f);
    expect(ref == 2.0f && std::abs(lane_sum(sum) - g2rl::kUnit) < 1e-5 && std::abs(lane_sum(sum_x)) < 1e-5,
           "later columns far above the first", lane_sum(sum), g2rl::kUnit);
  }
  two_units(0.0f, 10.0f);
  const double e10 = std::exp(10.0);
  expect(ref == 0.0f && std::abs(lane_sum(sum) / (g2rl::kUnit * (1 + e10)) - 1) < 1e-6 &&
             std::abs(lane_sum(sum_x) / (g2rl::kUnit * 10 * e10) - 1) < 1e-6,
         "later columns within the headroom", lane_sum(sum), g2rl::kUnit * (1 + e10));

  std::vector<uint32_t> in(16 * 32), out(32 * 16);
  const uint32_t* rows[16];
  for (int i = 0; i < 16 * 32; ++i) in[i] = i;
  for (int r = 0; r < 16; ++r) rows[r] = in.data() + r * 32;
  k.transpose16(rows, 32, out.data(), 16);
  for (int r = 0; r < 16; ++r)
    for (int c = 0; c < 32; ++c)
      expect(out[c * 16 + r] == in[r * 32 + c], "transpose", out[c * 16 + r], in[r * 32 + c]);

  // Every finite half survives widening, splitting into two parts and narrowing.
  for (int h = 0; h < 0x7c00; ++h) {
    const uint16_t half = static_cast<uint16_t>(h);
    float wide;
    uint16_t back, hi, lo, *parts[2] = {&hi, &lo};
    k.widen(&half, g2rl::Dtype::kHalf, 1, &wide);
    const double exact = std::ldexp(h < 0x400 ? h : 0x400 + (h & 0x3ff), (h < 0x400 ? 1 : h >> 10) - 25);
    expect(wide == exact, "widen", wide, exact);
    k.narrow(&wide, g2rl::Dtype::kHalf, 1, &back);
    expect(back == half, "narrow", back, half);
    k.split(&half, g2rl::Dtype::kHalf, 1, 2, parts);
    float a, b;
    k.widen(&hi, g2rl::Dtype::kBFloat16, 1, &a);
    k.widen(&lo, g2rl::Dtype::kBFloat16, 1, &b);
    expect(a + b == wide, "split", a + b, wide);
  }
  return g2rl::testing::outcome();
} catch (const std::exception& error) {
  std::puts(error.what());
  return 1;
}
