#include "head_features.h"

#include <cmath>
#include <cstring>

namespace g2rl {
namespace {

// What rounding can do to a row's sum; more means that nothing is there to balance.
constexpr double kImbalance = 1e-3;

}  // namespace

void Coefficients::set(const Responses& r, const std::vector<Token>& tokens, int64_t begin, int64_t end) {
  for (int64_t t = begin; t < end; ++t) {
    // An fp32 lse is only good to half a unit in its last place; what it lacks goes into the coefficient.
    ref[t] = static_cast<float>(tokens[t].lse);
    value[t] = static_cast<float>(-r.weight[t] * std::exp(ref[t] - tokens[t].lse));
  }
}

ResidualProduct::ResidualProduct(const HeadProblem& p, int64_t responses)
    : rows_(responses), width_(p.cut.width), left_(choose_format(Dtype::kFloat), rows_, width_) {}

void ResidualProduct::add(const HeadProblem& p, const float* sums, const ColumnPanels& panel, float* out,
                          double* totals, const Soon& soon) {
  for (int64_t b = 0; b < rows_; ++b) {
    const float* row = sums + b * width_;
    left_.fill(row, b, 0, width_);
    float lanes[kLanes] = {};
    for (int64_t i = 0; i < width_; i += kLanes)
      for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += row[i + lane];
    for (float lane : lanes) totals[b] += lane;
  }
  multiply_straight(left_, {0, rows_}, panel, width_, {0, p.padded_d(), row_stride(p.padded_d())}, out, soon);
}

float* SlabFeatures::clear(int64_t slab) const {
  float* out = data_.floats() + slab * slab_units_;
  std::memset(out, 0, slab_units_ * sizeof(float));
  return out;
}

void finish_features(const HeadProblem& p, const Responses& r, const std::vector<Token>& tokens,
                     const SlabFeatures& slabs, float* features) {
  parallel_for(r.first, r.last, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> row(p.d);
    std::vector<double> total(p.d);
    for (int64_t b = begin; b < end; ++b) {
      if (r.cu[b] == r.cu[b + 1]) continue;  // stays 0, whatever W holds
      std::fill(total.begin(), total.end(), 0.0);
      for (int64_t s = 0; s < p.cut.slabs; ++s) {
        const float* part = slabs.row(s, b - r.first);
        for (int64_t i = 0; i < p.d; ++i) total[i] += part[i];
      }
      // Without a cap a row of the whole R sums to zero, and what all rows of W share, large in real models, cancels:
      // the targets' entries are made to balance the others to the last digit, whatever rounding or a believed lse did
      // to those.
      double rest = 0, others = 0, balance = 1;
      for (int64_t t = r.cu[b]; t < r.cu[b + 1]; ++t) rest += r.weight[t] * tokens[t].rest;
      for (int64_t s = 0; s < p.cut.slabs; ++s) others -= slabs.total(s, b - r.first);
      if (p.whole && p.cap <= 0 && std::abs(others / rest - 1) < kImbalance) balance = others / rest;
      for (int64_t t = r.cu[b]; t < r.cu[b + 1]; ++t) {
        if (p.targets[t] < 0) continue;
        const double a = balance * r.weight[t] * tokens[t].rest * tokens[t].slope;
        rowwise().widen(p.weight.row(p.targets[t]), p.format.dtype, p.d, row.data());
        for (int64_t i = 0; i < p.d; ++i) total[i] += a * row[i];
      }
      for (int64_t i = 0; i < p.d; ++i) features[b * p.d + i] = static_cast<float>(p.scale * total[i]);
    }
  });
}

}  // namespace g2rl
