// Gradients of log p and entropy. With upstream gradients a of log p and h of the entropy H,
//   d/du_v = a (1[v = y] - p_v) - h p_v (log p_v + H),      log p_v = u_v - lse,      1 - p_y = -expm1(log p_y),
// and dz/du brings scale / temperature and the slope of the cap. One tile of these is g.
//
// The vocabulary goes by in strips. Each tile of a strip meets all tokens: g meets hidden while in cache, for the
// tile's rows of dweight, and is left in memory. Then each block of tokens meets the strip: g W is added to its rows of
// dhidden. So three products are enough, every output row has one owner, and its sum one order, whatever the strips.
//
// Where only dhidden is asked for, for many tokens, each block of them meets one tile after the other instead, and g W
// is added while g is in cache: the same sums in the same order.
#include <cmath>
#include <cstring>

#include "head_tiles.h"

namespace g2rl {
namespace {

// g = exp(u - lse) (c0 + c1 (u - lse)) off the target, `target` on it; scale / temperature is inside all three.
struct TokenGradients {
  std::vector<float> lse, c0, c1, target;

  // a and h [N] are the upstream gradients.
  TokenGradients(const HeadProblem& p, const float* a, const float* h, const TokenStats& stats)
      : lse(stats.lse, stats.lse + p.N), c0(p.N), c1(p.N), target(p.N) {
    const float* entropy = stats.entropy;
    const double k = p.scale / p.temperature;
    for (int64_t t = 0; t < p.N; ++t) {
      const double l = stats.logps[t];
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

// Summed per product of dweight: the fp32 tile of dweight is read and written once for that many.
constexpr int64_t kTokens = 512;
// Of a thread, from which on packing W for them alone costs less than leaving their g in memory.
constexpr int64_t kTokensAlone = 128;
// Of sums that stay in a cache while a strip goes by.
constexpr int64_t kCachedBytes = 1 << 20;

class Backward {
 public:
  Backward(const HeadProblem& p, const TokenGradients& grads, const Gradients& out, int64_t workspace_bytes)
      : p_(p),
        grads_(grads),
        out_(out),
        rows_(p.rows(0, p.N)),
        cols_(p.padded_d()),
        stride_(row_stride(cols_)),
        width_(p.cut.width) {
    if (out.weight) pack_hidden();
    if (!out.hidden) return;
    const int64_t tokens = rows_.blocks() * kRows;
    dhidden_ = Buffer(tokens * stride_ * sizeof(float));
    if (by_tokens()) return;
    const int64_t unit = sizeof(uint32_t) * p.format.parts / p.format.per_unit();
    const int64_t tile_bytes = (tokens + cols_) * width_ * unit, most = p.allowed_bytes(workspace_bytes) / tile_bytes;
    // Fewer than there are threads would leave some without work. No more where coming back to the sums strip by strip
    // costs nothing, as a cache holds them: so it does what a strip leaves, which is new memory otherwise.
    const bool cached = tokens * stride_ * static_cast<int64_t>(sizeof(float)) <= kCachedBytes;
    const int64_t threads = num_threads(), tiles = std::min(cached ? threads : std::max(most, threads), p.cut.tiles);
    for (int64_t i = 0; i < tiles; ++i) {
      gradients_.emplace_back(p.format, tokens, width_);
      weights_.emplace_back(p.format, p.depth, width_);
    }
  }

  void run() {
    if (by_tokens()) {
      for_tasks(
          token_tasks(), [&] { return Alone(p_); },
          [&](Alone& s, int64_t task) {
            const auto [begin, end] = blocks_of(task);
            pass_words(s, begin, end);
          });
      return;
    }
    pass_strips(out_.hidden ? static_cast<int64_t>(gradients_.size()) : p_.cut.tiles);
  }

 private:
  // Strips of `tiles` tiles, each of two phases; the last may have fewer. One of all tiles has the first phase alone
  // where nobody wants hidden's gradient.
  void pass_strips(int64_t tiles) {
    const int64_t strips = (p_.cut.tiles + tiles - 1) / tiles;
    const auto count = [&](int64_t strip) { return std::min(tiles, p_.cut.tiles - strip * tiles); };
    std::vector<int64_t> tasks;
    for (int64_t strip = 0; strip < strips; ++strip) {
      tasks.push_back(count(strip));
      if (out_.hidden) tasks.push_back(token_tasks() * column_shares());
    }
    for_phases(
        tasks, [&] { return State(p_); },
        [&](State& s, size_t phase, int64_t task) {
          const int64_t strip = phase / 2, first = strip * tiles;
          if (phase % 2) return pass_tokens(first, count(strip), task);
          pass_tile(s, first + task, task);
        });
  }

  bool by_tokens() const { return out_.hidden && !out_.weight && !out_.bias && p_.N >= kTokensAlone * num_threads(); }

  // A thread's.
  struct State {
    explicit State(const HeadProblem& p)
        : logits(p),
          left(p.format, p.cut.width, kTokens),
          turned(p.cut.width * kRows * sizeof(float)),
          dweight(p.cut.width * row_stride(p.padded_d()) * sizeof(float)),
          dbias(p.cut.width) {}
    LogitTile logits;
    LeftParts left;
    Buffer turned, dweight;
    std::vector<float> dbias;
  };

  // Hidden as a right operand, one panel of kTokens rows after the other.
  void pack_hidden() {
    for (int64_t t = 0; t < p_.N; t += kTokens) hidden_.emplace_back(p_.format, p_.depth, kTokens);
    for_tasks(
        static_cast<int64_t>(hidden_.size()), [] { return 0; },
        [&](int, int64_t i) { hidden_[i].pack(p_.hidden, i * kTokens, /*transposed=*/false, /*straight=*/true); });
  }

  // One tile of the vocabulary, the strip's i-th.
  void pass_tile(State& s, int64_t tile, int64_t i) {
    s.logits.load(tile, /*straight=*/false);
    if (out_.hidden) weights_[i].pack(p_.weight, s.logits.first(), /*transposed=*/false, /*straight=*/true);
    if (out_.weight) std::memset(s.dweight.floats(), 0, width_ * stride_ * sizeof(float));
    std::fill(s.dbias.begin(), s.dbias.end(), 0.0f);
    for (int64_t t = 0; t < p_.N; t += kTokens) {
      for_gradients(p_, rows_, grads_, s.logits, t / kRows, std::min((t + kTokens) / kRows, rows_.blocks()),
                    [&](const Tile& g, int64_t block) {
                      clear_outside(g);
                      if (out_.bias) rowwise().column_sums(g, s.dbias.data());
                      if (out_.hidden) keep(g, gradients_[i], block * kRows);
                      if (out_.weight) turn(s, g, block * kRows - t);
                    });
      if (out_.weight) {
        const int64_t tokens = std::min(kTokens, (p_.N - t + kRows - 1) / kRows * kRows);
        multiply_straight(s.left, {0, s.logits.width()}, hidden_[t / kTokens], tokens, all_columns(),
                          s.dweight.floats());
      }
    }
    const int64_t first = s.logits.first(), count = s.logits.cols();
    if (out_.bias) std::copy_n(s.dbias.data(), count, out_.bias + first);
    if (out_.weight) narrow_rows(s.dweight.floats(), count, out_.weight, first, all_columns());
  }

  // Gradients beyond the tile's tokens and words, which the products below sum over: 0.
  void clear_outside(const Tile& g) const {
    for (int r = 0; r < kRows; ++r) {
      const int64_t inside = r < g.rows ? g.cols : 0;
      std::memset(g.acc + r * g.ld + inside, 0, (width_ - inside) * sizeof(float));
    }
  }

  void keep(const Tile& g, const LeftParts& to, int64_t token) const {
    for (int r = 0; r < kRows; ++r) to.fill(g.acc + r * g.ld, token + r, 0, width_);
  }

  // A row for each word, from `token` on.
  void turn(State& s, const Tile& g, int64_t token) const {
    for (int64_t r = 0; r < kRows; r += 16) {
      const uint32_t* from[16];
      for (int i = 0; i < 16; ++i) from[i] = reinterpret_cast<const uint32_t*>(g.acc + (r + i) * g.ld);
      rowwise().transpose16(from, g.width, s.turned.units() + r, kRows);
    }
    for (int64_t v = 0; v < g.width; ++v) s.left.fill(s.turned.floats() + v * kRows, v, token, kRows);
  }

  // A task's tokens, with the strip of `count` tiles from `first` on: they share the strip's rows of W.
  void pass_tokens(int64_t first, int64_t count, int64_t task) {
    const int64_t shares = column_shares();
    const auto [begin, end] = blocks_of(task / shares);
    const Columns columns = share(task % shares, shares);
    if (first == 0) clear_sums(begin, end, columns);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t block = begin; block < end; ++block)
        multiply_straight(gradients_[i], {block * kRows, kRows}, weights_[i], width_, columns, sums(block));
    if (first + count == p_.cut.tiles) narrow_sums(begin, end, columns);
  }
  // Where tasks of tokens leave threads without one, several share the columns.
  int64_t column_shares() const { return std::clamp<int64_t>(num_threads() / token_tasks(), 1, column_blocks()); }

  // A thread's, for tokens that meet all words.
  struct Alone {
    explicit Alone(const HeadProblem& p) : logits(p), left(p.format, kRows, p.cut.width) {}
    LogitTile logits;
    LeftParts left;
  };

  // Blocks of tokens, with all of the vocabulary.
  void pass_words(Alone& s, int64_t begin, int64_t end) {
    clear_sums(begin, end, all_columns());
    for (int64_t tile = 0; tile < p_.cut.tiles; ++tile) {
      s.logits.load(tile, /*straight=*/true);
      for_gradients(p_, rows_, grads_, s.logits, begin, end, [&](const Tile& g, int64_t block) {
        clear_outside(g);
        keep(g, s.left, 0);
        multiply_straight(s.left, {0, kRows}, s.logits.panel(), width_, all_columns(), sums(block));
      });
    }
    narrow_sums(begin, end, all_columns());
  }

  // Tasks of several blocks of tokens: many share a packed tile of W, few keep every thread busy.
  int64_t blocks_per_task() const {
    const int64_t threads = num_threads();
    return std::clamp<int64_t>((rows_.blocks() + threads - 1) / threads, 1, kTokens / kRows);
  }
  int64_t token_tasks() const { return (rows_.blocks() + blocks_per_task() - 1) / blocks_per_task(); }
  std::pair<int64_t, int64_t> blocks_of(int64_t task) const {
    return {task * blocks_per_task(), std::min((task + 1) * blocks_per_task(), rows_.blocks())};
  }

  Columns all_columns() const { return {0, cols_, stride_}; }
  int64_t column_blocks() const { return (cols_ + kUnit - 1) / kUnit; }
  // The i-th of so many shares of whole blocks.
  Columns share(int64_t i, int64_t shares) const {
    const auto bound = [&](int64_t n) { return std::min(n * column_blocks() / shares * kUnit, cols_); };
    return {bound(i), bound(i + 1) - bound(i), stride_};
  }

  float* sums(int64_t block) const { return dhidden_.floats() + block * kRows * stride_; }
  void clear_sums(int64_t begin, int64_t end, const Columns& columns) const {
    for (int64_t r = begin * kRows; r < end * kRows; ++r)
      std::memset(sums(0) + r * stride_ + columns.first, 0, columns.count * sizeof(float));
  }
  void narrow_sums(int64_t begin, int64_t end, const Columns& columns) const {
    const int64_t token = begin * kRows;
    narrow_rows(sums(begin), std::min(end * kRows, p_.N) - token, out_.hidden, token, columns);
  }

  // Rows of fp32 sums to rows from `first` on of an output.
  void narrow_rows(const float* sums, int64_t count, void* out, int64_t first, const Columns& columns) const {
    const int64_t size = p_.format.element_size(), last = std::min(columns.first + columns.count, p_.d);
    for (int64_t r = 0; r < count; ++r)
      rowwise().narrow(sums + r * stride_ + columns.first, p_.format.dtype, last - columns.first,
                       static_cast<char*>(out) + ((first + r) * p_.d + columns.first) * size);
  }

  const HeadProblem& p_;
  const TokenGradients& grads_;
  const Gradients out_;
  const RowPanels rows_;
  const int64_t cols_, stride_, width_;
  std::vector<ColumnPanels> hidden_;
  // Of a strip's tiles: g [tokens, width], and rows of W.
  std::vector<LeftParts> gradients_;
  std::vector<ColumnPanels> weights_;
  Buffer dhidden_;  // [tokens, stride]
};

}  // namespace

void logprobs_backward(const float* grad_logps, const float* grad_entropy, const Tokens& tokens, const Head& head,
                       const TokenStats& stats, int64_t workspace_bytes, const Gradients& out) {
  const HeadProblem p(tokens, head);
  if (p.N > 0) {
    const TokenGradients grads(p, grad_logps, grad_entropy, stats);
    Backward(p, grads, out, workspace_bytes).run();
    return;
  }
  if (out.weight) std::memset(out.weight, 0, p.V * p.d * p.format.element_size());
  if (out.bias) std::fill_n(out.bias, p.V, 0.0f);
}

}  // namespace g2rl
