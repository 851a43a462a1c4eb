#include "head_tiles.h"

#include "isa.h"

#include <cmath>
#include <limits>

namespace g2rl {
namespace {

constexpr int64_t kPanelBytes = 1024 * 1024;  // a packed panel of weights, to share L2 with the rows that meet it
// Tasks of a pass: 24, 32, 48 or 96 threads all have as many.
constexpr int64_t kSlabs = 96;
// The rows of W for the next tile are fetched early if no more than this: L2 then holds them too.
constexpr int64_t kFetchBytes = 512 * 1024;
constexpr double kShareOfLogits = 0.044;  // with what else a pass allocates, 5 %
// Of few tokens a share is too little to keep exponentials in, and they would pay a second product for it.
constexpr int64_t kLeastBytes = 64 << 20;
// Up to this d a bf16 product by AMX costs no more than keeping what would save it, and fresh pages to keep it in.
constexpr int64_t kShallow = 1024;

VocabCut cut_vocabulary(int64_t V, const Depth& depth, const Format& format) {
  const int64_t column_bytes = depth.units * format.parts * sizeof(uint32_t);
  const int64_t width = std::clamp<int64_t>(kPanelBytes / column_bytes / 64 * 64, 64, kMaxWidth);
  const int64_t tiles = std::max<int64_t>(1, (V + width - 1) / width);
  return {width, tiles, std::min(tiles, kSlabs)};
}

}  // namespace

HeadProblem::HeadProblem(const Tokens& tokens, const Head& head, bool whole_)
    : whole(whole_),
      N(tokens.hidden.rows),
      d(tokens.hidden.cols),
      V(head.weight.rows),
      format(choose_format(tokens.hidden.dtype)),
      depth(d, format),
      cut(cut_vocabulary(V, depth, format)),
      hidden(tokens.hidden),
      weight(head.weight),
      targets(tokens.targets),
      scale(head.logit_scale),
      temperature(head.temperature),
      cap(head.softcap) {
  const double factor = scale / (cap > 0 ? cap : temperature);
  map = {static_cast<float>(factor), nullptr, static_cast<float>(cap > 0 ? cap / temperature : 0.0)};
  alpha = map.alpha;
  if (head.bias || cap > 0 || map.alpha <= 0) {
    alpha = 1.0f;
    bias.assign(cut.padded(), 0.0f);
  }
  if (head.bias) {
    raw_bias.assign(head.bias, head.bias + V);
    for (int64_t v = 0; v < V; ++v) bias[v] = static_cast<float>(raw_bias[v] * factor);
  }
}

int64_t HeadProblem::allowed_bytes(int64_t workspace_bytes) const {
  if (workspace_bytes > 0) return workspace_bytes;
  const int64_t share = kShareOfLogits * N * V * sizeof(float);
  return isa() == Isa::kAmx && format.parts == 1 && d <= kShallow ? share : std::max(kLeastBytes, share);
}

Soon HeadProblem::rows_soon(int64_t first, int64_t count) const {
  const int64_t begin = std::min(first, weight.rows), bytes = std::min(count, weight.rows - begin) * weight.row_bytes;
  return bytes <= kFetchBytes ? Soon{weight.row(begin), bytes / 64} : Soon{};
}

double HeadProblem::logit(double raw) const {
  const double z = scale * raw;
  return (cap > 0 ? cap * std::tanh(z / cap) : z) / temperature;
}

double HeadProblem::cap_slope(double raw) const {
  if (cap <= 0) return 1.0;
  const double c = std::cosh(scale * raw / cap);
  return 1.0 / (c * c);
}

LogitTile::LogitTile(const HeadProblem& problem)
    : problem_(problem),
      panel_(problem.format, problem.depth, problem.cut.width),
      acc_(2 * kRows * row_stride(problem.cut.width) * sizeof(float)) {
  if (problem.cap > 0) slope_ = Buffer(kRows * row_stride(problem.cut.width) * sizeof(float));
}

void LogitTile::load(int64_t tile, bool straight) {
  first_ = tile * problem_.cut.width;
  panel_.pack(problem_.weight, first_, /*transposed=*/true, straight);
  tile_.ld = row_stride(problem_.cut.width);
  tile_.cols = static_cast<int>(problem_.cut.cols(tile, problem_.V));
  tile_.width = static_cast<int>(problem_.cut.whole_units(tile, problem_.V));
}

void LogitTile::straighten() { panel_.pack(problem_.weight, first_, /*transposed=*/false, /*straight=*/true); }

TileProduct LogitTile::start(const RowPanels& rows, int64_t block) {
  turn_ = 1 - turn_;
  tile_.acc = acc_.floats() + turn_ * kRows * tile_.ld;
  tile_.rows = static_cast<int>(rows.rows(block));
  first_token_ = rows.first(block);
  TileProduct product =
      rows_product(problem_.format, problem_.depth, rows.block(block), tile_.rows, panel_, tile_.acc, tile_.ld);
  product.soon = problem_.rows_soon(first_ + tile_.cols, tile_.cols).share(block, rows.blocks());
  return product;
}

Tile LogitTile::finish(bool want_slope, float* targets) {
  constexpr float kMasked = -std::numeric_limits<float>::infinity();
  const bool mapped = !problem_.bias.empty();
  const auto for_targets = [&](const auto& f) {
    for (int r = 0; r < tile_.rows; ++r) {
      const int64_t c = problem_.targets[first_token_ + r] - first_;
      if (c >= 0 && c < tile_.cols) f(r, tile_.acc[r * tile_.ld + c]);
    }
  };
  for_targets([&](int r, float& raw) {
    if (targets) targets[r] = raw;
    if (!mapped) raw = kMasked;
  });
  if (mapped) {
    LogitMap map = problem_.map;
    map.bias = problem_.bias.data() + first_;
    rowwise().logits(tile_, map, want_slope ? slope_.floats() : nullptr);
    for_targets([&](int, float& u) { u = kMasked; });
  }
  if (tile_.cols < tile_.width)
    for (int r = 0; r < tile_.rows; ++r)
      std::fill(tile_.acc + r * tile_.ld + tile_.cols, tile_.acc + r * tile_.ld + tile_.width, kMasked);
  return tile_;
}

}  // namespace g2rl
