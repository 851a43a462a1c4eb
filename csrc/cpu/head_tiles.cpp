#include "head_tiles.h"

#include <cmath>
#include <limits>

namespace g2rl {
namespace {

constexpr int64_t kPanelBytes = 1024 * 1024;  // a packed panel of weights, to share L2 with the rows that meet it
constexpr int64_t kSlabs = 32;

VocabCut cut_vocabulary(int64_t V, const Depth& depth, const Format& format) {
  const int64_t column_bytes = depth.padded() * format.parts * sizeof(uint32_t);
  const int64_t width = std::clamp<int64_t>(kPanelBytes / column_bytes / 64 * 64, 64, kMaxWidth);
  const int64_t tiles = std::max<int64_t>(1, (V + width - 1) / width);
  return {width, tiles, std::min(tiles, kSlabs)};
}

}  // namespace

HeadProblem::HeadProblem(const at::Tensor& hidden_, const Head& head, const at::Tensor& targets_)
    : N(hidden_.size(0)),
      d(hidden_.size(1)),
      V(head.weight.size(0)),
      format(choose_format(hidden_.scalar_type())),
      depth(split_depth(d, format)),
      cut(cut_vocabulary(V, depth, format)),
      hidden(view(hidden_)),
      weight(view(head.weight)),
      targets(targets_.const_data_ptr<int64_t>()),
      scale(head.logit_scale),
      temperature(head.temperature),
      cap(head.softcap) {
  map.alpha = static_cast<float>(cap > 0 ? scale / cap : scale / temperature);
  map.cap_over_t = static_cast<float>(cap > 0 ? cap / temperature : 0.0);
  map.bias = nullptr;
  alpha = map.alpha;
  if (head.bias || cap > 0 || map.alpha <= 0) {
    alpha = 1.0f;
    bias.assign(cut.tiles * cut.width, 0.0f);
    raw_bias.assign(V, 0.0);
    if (head.bias) {
      const at::Tensor b = head.bias->to(at::kDouble).contiguous();
      const double* values = b.const_data_ptr<double>();
      const double factor = cap > 0 ? scale / cap : scale / temperature;
      for (int64_t v = 0; v < V; ++v) {
        raw_bias[v] = values[v];
        bias[v] = static_cast<float>(values[v] * factor);
      }
    }
  }
}

double HeadProblem::logit(double acc, int64_t v) const {
  const double z = scale * (acc + (raw_bias.empty() ? 0.0 : raw_bias[v]));
  return (cap > 0 ? cap * std::tanh(z / cap) : z) / temperature;
}

double HeadProblem::cap_slope(double acc, int64_t v) const {
  if (cap <= 0) return 1.0;
  const double c = std::cosh(scale * (acc + raw_bias[v]) / cap);
  return 1.0 / (c * c);
}

LogitTile::LogitTile(const HeadProblem& problem)
    : problem_(problem), panel_(problem.format, problem.depth, problem.cut.width), acc_(kRows * problem.cut.width * sizeof(float)) {
  if (problem.cap > 0) slope_ = Buffer(kRows * problem.cut.width * sizeof(float));
}

void LogitTile::load(int64_t tile, bool straight) {
  first_ = tile * problem_.cut.width;
  panel_.pack(problem_.weight, first_, /*transposed=*/true, straight);
  tile_.acc = acc_.floats();
  tile_.ld = problem_.cut.width;
  tile_.cols = static_cast<int>(std::min(problem_.cut.width, problem_.V - first_));
  tile_.width = (tile_.cols + 15) / 16 * 16;
}

void LogitTile::compute(const RowPanels& rows, int64_t block, bool want_slope, float* target_acc) {
  constexpr float kMasked = -std::numeric_limits<float>::infinity();
  multiply_rows(problem_.format, problem_.depth, rows.block(block), rows.rows(block), panel_, tile_.acc);
  const int64_t first_token = rows.first(block);
  tile_.rows = static_cast<int>(rows.rows(block));
  if (target_acc) {
    for (int r = 0; r < tile_.rows; ++r) {
      const int64_t c = problem_.targets[first_token + r] - first_;
      if (c >= 0 && c < tile_.cols) target_acc[first_token + r] = tile_.acc[r * tile_.ld + c];
    }
  }
  if (!problem_.bias.empty()) {
    LogitMap map = problem_.map;
    map.bias = problem_.bias.data() + first_;
    rowwise().logits(tile_, map, want_slope ? slope_.floats() : nullptr);
  }
  for (int r = 0; r < tile_.rows; ++r) {
    float* row = tile_.acc + r * tile_.ld;
    for (int c = tile_.cols; c < tile_.width; ++c) row[c] = kMasked;
    const int64_t c = problem_.targets[first_token + r] - first_;
    if (c >= 0 && c < tile_.cols) row[c] = kMasked;
  }
}

}  // namespace g2rl
