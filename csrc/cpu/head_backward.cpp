// Gradients of log p and entropy. With upstream gradients a of log p and h of the entropy H,
//   d/du_v = a (1[v = y] - p_v) - h p_v (log p_v + H),      log p_v = u_v - lse,      1 - p_y = -expm1(log p_y),
// and dz/du brings scale / temperature and the slope of the cap. One tile g of these meets W (for dhidden) or hidden
// (for dweight) while in cache.
//
// dweight runs over tiles of vocabulary, dhidden over blocks of tokens, each recomputing the logits: every output row
// then has one owner and one order of summation, and no partial sums the size of an output are kept.
#include <ATen/ops/empty.h>

#include <cmath>
#include <cstring>

#include "head_tiles.h"

namespace g2rl {
namespace {

// g = exp(u - lse) (c0 + c1 (u - lse)) off the target, `target` on it; scale / temperature is inside all three.
struct TokenGradients {
  std::vector<float> lse, c0, c1, target;

  TokenGradients(const HeadProblem& p, const at::Tensor& grad_logps, const at::Tensor& grad_entropy,
                 const TokenStats& stats)
      : lse(p.N), c0(p.N), c1(p.N), target(p.N) {
    const float *a = grad_logps.const_data_ptr<float>(), *h = grad_entropy.const_data_ptr<float>();
    const float *logp = stats.logps.const_data_ptr<float>(), *entropy = stats.entropy.const_data_ptr<float>();
    const double k = p.scale / p.temperature;
    for (int64_t t = 0; t < p.N; ++t) {
      const double l = logp[t];
      lse[t] = stats.lse.const_data_ptr<float>()[t];
      c0[t] = static_cast<float>(-k * (a[t] + static_cast<double>(h[t]) * entropy[t]));
      c1[t] = static_cast<float>(-k * h[t]);
      target[t] = static_cast<float>(k * (-a[t] * std::expm1(l) - h[t] * std::exp(l) * (l + entropy[t])));
    }
  }

  // Turns a tile of logits, the first of them of token t, into g; `finish` then sets the targets' entries.
  GradientJob job(const HeadProblem& p, const LogitTile& logits, const Tile& tile, int64_t t) const {
    return {.tile = tile,
            .alpha = p.alpha,
            .lse = lse.data() + t,
            .c0 = c0.data() + t,
            .c1 = c1.data() + t,
            .slope = logits.slope()};
  }
  void finish(const HeadProblem& p, const LogitTile& logits, const GradientJob& job, int64_t t) const {
    for (int r = 0; r < job.tile.rows; ++r) {
      const int64_t c = p.targets[t + r] - logits.first();
      if (c >= 0 && c < job.tile.cols)
        job.tile.acc[r * job.tile.ld + c] = target[t + r] * (job.slope ? job.slope[r * job.tile.ld + c] : 1.0f);
    }
  }
};

// Calls f(g, block) with the gradients of the loaded tile's logits for blocks begin..end of tokens; each product goes
// on while the block before it is turned into gradients.
template <typename F>
void for_gradients(const HeadProblem& p, const RowPanels& rows, const TokenGradients& grads, LogitTile& logits,
                   int64_t begin, int64_t end, const F& f) {
  GradientJob pending;
  for (int64_t block = begin; block <= end; ++block) {
    rowwise().gradient(pending, block < end ? logits.start(rows, block) : TileProduct{});
    if (block > begin) {
      grads.finish(p, logits, pending, rows.first(block - 1));
      f(pending.tile, block - 1);
    }
    if (block < end) pending = grads.job(p, logits, logits.finish(/*want_slope=*/true, nullptr), rows.first(block));
  }
}

constexpr int64_t kTokens =
    512;  // summed per product of dweight: the fp32 tile of dweight is read and written once for that many

void weight_gradient(const HeadProblem& p, const RowPanels& rows, const TokenGradients& grads,
                     const at::Tensor* dweight, float* dbias) {
  const int64_t cols = p.padded_d(), stride = row_stride(cols), width = p.cut.width, element = p.format.element_size();
  // hidden as a right operand, one panel of kTokens rows after the other
  std::vector<ColumnPanels> hidden;
  if (dweight) {
    for (int64_t t = 0; t < p.N; t += kTokens) hidden.emplace_back(p.format, p.depth, kTokens);
    for_tasks(
        static_cast<int64_t>(hidden.size()), [] { return 0; },
        [&](int, int64_t i) { hidden[i].pack(p.hidden, i * kTokens, /*transposed=*/false, true); });
  }
  struct State {
    LogitTile logits;
    LeftParts left;
    Buffer turned, sum;
  };
  for_tasks(
      p.cut.tiles,
      [&] {
        return State{LogitTile(p), LeftParts(p.format, width, kTokens), Buffer(width * kRows * sizeof(float)),
                     Buffer(width * stride * sizeof(float))};
      },
      [&](State& s, int64_t tile) {
        s.logits.load(tile, /*straight=*/false);
        std::memset(s.sum.floats(), 0, width * stride * sizeof(float));
        std::vector<float> bias_sum(width, 0.0f);
        for (int64_t t = 0; t < p.N; t += kTokens) {
          for_gradients(p, rows, grads, s.logits, t / kRows, std::min((t + kTokens) / kRows, rows.blocks()),
                        [&](const Tile& g, int64_t block) {
                          if (dbias) rowwise().column_sums(g, bias_sum.data());
                          if (!dweight) return;
                          std::memset(g.acc + g.rows * g.ld, 0, (kRows - g.rows) * g.ld * sizeof(float));
                          for (int64_t r = 0; r < kRows; r += 16) {
                            const uint32_t* src[16];
                            for (int i = 0; i < 16; ++i)
                              src[i] = reinterpret_cast<const uint32_t*>(g.acc + (r + i) * g.ld);
                            rowwise().transpose16(src, g.width, s.turned.units() + r, kRows);
                          }
                          for (int64_t v = 0; v < g.width; ++v)
                            s.left.fill(s.turned.floats() + v * kRows, v, block * kRows - t, kRows);
                        });
          if (!dweight) continue;
          const int64_t tokens = std::min(kTokens, (p.N - t + kRows - 1) / kRows * kRows);
          multiply_straight(p.format, s.left, s.logits.width(), hidden[t / kTokens].straight(),
                            kTokens / p.format.per_unit(), tokens / p.format.per_unit(), cols, s.sum.floats());
        }
        const int64_t first = s.logits.first();
        for (int64_t v = 0; v < s.logits.cols(); ++v) {
          if (dbias) dbias[first + v] = bias_sum[v];
          if (!dweight) continue;
          char* out = static_cast<char*>(dweight->mutable_data_ptr()) + (first + v) * p.d * element;
          rowwise().narrow(s.sum.floats() + v * stride, p.format.dtype, p.d, out);
        }
      });
}

void hidden_gradient(const HeadProblem& p, const RowPanels& rows, const TokenGradients& grads,
                     const at::Tensor& dhidden) {
  const int64_t cols = p.padded_d(), stride = row_stride(cols), width = p.cut.width, element = p.format.element_size();
  // Tokens per task: many share a packed panel of weights, few keep every thread busy. Rows never mix, so the choice
  // cannot change a result.
  const int64_t threads = at::get_num_threads(), most = kTokens / kRows;
  const int64_t blocks = std::clamp<int64_t>((rows.blocks() + threads - 1) / threads, 1, most);
  struct State {
    LogitTile logits;
    LeftParts left;
    Buffer sum;
  };
  for_tasks(
      (rows.blocks() + blocks - 1) / blocks,
      [&] {
        return State{LogitTile(p), LeftParts(p.format, kRows, width), Buffer(blocks * kRows * stride * sizeof(float))};
      },
      [&](State& s, int64_t task) {
        const int64_t first = task * blocks, end = std::min(first + blocks, rows.blocks());
        std::memset(s.sum.floats(), 0, blocks * kRows * stride * sizeof(float));
        for (int64_t tile = 0; tile < p.cut.tiles; ++tile) {
          s.logits.load(tile, /*straight=*/true);
          for_gradients(p, rows, grads, s.logits, first, end, [&](const Tile& g, int64_t block) {
            for (int r = 0; r < kRows; ++r) {
              float* row = g.acc + r * g.ld;
              const int64_t keep = r < g.rows ? g.cols : 0;
              std::memset(row + keep, 0, (width - keep) * sizeof(float));
              s.left.fill(row, r, 0, width);
            }
            multiply_straight(p.format, s.left, kRows, s.logits.panel().straight(), width / p.format.per_unit(),
                              width / p.format.per_unit(), cols, s.sum.floats() + (block - first) * kRows * stride);
          });
        }
        for (int64_t t = first * kRows; t < std::min(end * kRows, p.N); ++t) {
          char* out = static_cast<char*>(dhidden.mutable_data_ptr()) + t * p.d * element;
          rowwise().narrow(s.sum.floats() + (t - first * kRows) * stride, p.format.dtype, p.d, out);
        }
      });
}

}  // namespace

std::array<at::Tensor, 3> logprobs_backward(const at::Tensor& grad_logps, const at::Tensor& grad_entropy,
                                            const at::Tensor& hidden, const Head& head, const at::Tensor& targets,
                                            const TokenStats& stats, int64_t, Needs needs) {
  const HeadProblem p(hidden, head, targets);
  std::array<at::Tensor, 3> out;
  if (needs.hidden) out[0] = at::empty({p.N, p.d}, hidden.options());
  if (needs.weight) out[1] = at::empty({p.V, p.d}, hidden.options());
  at::Tensor dbias;
  if (needs.bias && head.bias) dbias = at::empty({p.V}, hidden.options().dtype(at::kFloat));
  if (p.N == 0) {
    if (needs.weight) out[1].zero_();
    if (dbias.defined()) dbias.zero_();
  } else {
    const RowPanels rows(p.hidden, p.format, p.depth, 0, p.N);
    const TokenGradients grads(p, grad_logps, grad_entropy, stats);
    if (needs.hidden) hidden_gradient(p, rows, grads, out[0]);
    if (needs.weight || dbias.defined())
      weight_gradient(p, rows, grads, needs.weight ? &out[1] : nullptr,
                      dbias.defined() ? dbias.mutable_data_ptr<float>() : nullptr);
  }
  if (dbias.defined()) out[2] = dbias.to(head.bias->scalar_type());
  return out;
}

}  // namespace g2rl
