// The plan with one product per token. For a block of tokens: go over the vocabulary once, collecting the statistics
// and keeping every exponential in 16 bits; then, with the tokens' lse known, add the kept numbers up into R. After the
// last block R meets W, once for a group of responses.
//
// W is streamed once per block, so this pays when a block is large. A block is what fits in the workspace beside R of a
// group. Column sums take a response's tokens in order whatever the blocks, and two products round to the same 16 bits:
// the plan does not change a bit of a result.
#include <atomic>
#include <cstring>
#include <memory>

#include "head_features.h"
#include "isa.h"

namespace g2rl {
namespace {

// Two products stream W twice. Tokens for which each further streaming of it must spare a second product: what
// streaming and packing an entry of W costs over what a product of it with a token does, less keeping that. On AMX
// fewer for fp16 and fp32, which do more products per byte; elsewhere a product takes ten times as long.
int64_t least_tokens_per_stream(const Format& format) {
  if (isa() < Isa::kAmx) return 20;
  return format.parts == 1 ? 150 : 110;
}

// `tokens` in equal blocks of at most `most`, whole AMX tiles each.
int64_t even_block(int64_t tokens, int64_t most) {
  const int64_t blocks = (tokens + most - 1) / most;
  return (tokens + blocks * kRowStep - 1) / (blocks * kRowStep) * kRowStep;
}

}  // namespace

KeptPlan plan_kept(const HeadProblem& p, const Responses& all, int64_t workspace_bytes) {
  if (p.cap > 0) return {};  // the cap's slopes would have to be kept too
  const int64_t limit = p.allowed_bytes(workspace_bytes);
  const int64_t threads = std::min<int64_t>(num_threads(), p.cut.slabs), unit = sizeof(float);
  const int64_t row_units = p.depth.units * p.format.parts;
  const int64_t fixed = threads * (p.cut.width * row_units + 2 * kRows * row_stride(p.cut.width)) * unit;
  const int64_t per_token = p.cut.padded() * 2 + p.cut.tiles * 2 * unit + row_units * unit + p.cut.slabs * 3 * unit +
                            threads * 2 * kLanes * unit;
  // What R of a group takes is missing for its tokens, and each group streams W once more for R W. Its slabs' parts of
  // Phi come when the tokens' numbers have gone.
  KeptPlan best{};
  int64_t fewest = p.N / least_tokens_per_stream(p.format) + 3;
  for (int64_t group = product_rows(1); group <= kResponses; group *= 2) {
    const int64_t responses = std::min(group, all.last - all.first),
                  of_R = product_rows(responses) * p.cut.padded() * unit;
    const int64_t most = (limit - fixed - of_R) / per_token / kRowStep * kRowStep;
    if (most <= 0 || of_R + slab_features_bytes(p, responses) > limit) break;
    int64_t streams = 0;
    for_groups(all, group,
               [&](const Responses& r) { streams += (r.token_end() - r.token_begin() + most - 1) / most + 1; });
    if (streams < fewest) best = {most, group}, fewest = streams;
  }
  return best;
}

namespace {

struct Span {
  int64_t begin = 0, end = 0;
  int64_t size() const { return end - begin; }
};

// One group of responses under way. A tile of vocabulary is visited once per block: what it kept of the block before,
// whose lse are known by now, is added up while it makes room for this block's.
class KeptPass {
 public:
  KeptPass(const HeadProblem& p, const Responses& r, int64_t block, std::vector<Token>& tokens)
      : p_(p),
        r_(r),
        block_(block),
        tokens_(tokens),
        coef_(p.N),
        scales_(p.cut.tiles, block),
        kept_(p.cut.tiles * block * p.cut.width * sizeof(uint16_t)),
        residual_(r.padded() * p.cut.padded() * sizeof(float)),
        workers_(num_threads()) {}

  // Keeps the exponentials of `now` in place of the block before; their tokens' results go to `stats`.
  void statistics(Span now, const TokenStats& stats) {
    const RowPanels rows = p_.rows(now.begin, now.size());
    const Partials partials(p_.cut.slabs, now.begin, now.size());
    std::atomic<int64_t> started{0};
    for_tasks(
        p_.cut.slabs, [&] { return worker(started++); },
        [&](Worker* w, int64_t slab) {
          slab_statistics(p_, rows, slab, w->logits, w->sums, partials, &scales_, *this);
        });
    merge_slabs(p_, partials, now.begin, now.end, stats, tokens_.data());
    coef_.set(r_, tokens_, now.begin, now.end);
    last_ = now;
  }

  // The keeper's part in slab_statistics.

  // R starts from zero when the first block's numbers are about to be added.
  void open(int64_t tile) const {
    if (last_.begin == r_.token_begin()) std::memset(residual(tile), 0, r_.padded() * p_.cut.width * sizeof(float));
  }

  // What a tile of R gets from a block of the tokens kept last.
  KeptJob before(int64_t tile, int64_t block) const {
    KeptJob job;
    const int64_t begin = std::min(last_.begin + block * kRows, last_.end), end = std::min(begin + kRows, last_.end),
                  i = begin - last_.begin;
    if (begin == end) return job;
    job.kept = kept(tile, i);
    job.rows = static_cast<int>(end - begin);
    job.width = static_cast<int>(p_.cut.whole_units(tile, p_.V));
    float unit[kRows];
    rowwise().kept_scales(job.rows, scales_.ref(tile, i), scales_.top(tile, i), coef_.ref.data() + begin,
                          coef_.value.data() + begin, unit, job.coef);
    point_to_responses(r_, begin, end, residual(tile), p_.cut.width, job.out);
    return job;
  }

  Kept kept(int64_t tile, int64_t i) const {
    return {kept_.halves() + (tile * block_ + i) * p_.cut.width, p_.cut.width};
  }

  // The same for the blocks from `block` on, with no product to go along.
  void close(int64_t tile, int64_t block) const {
    for (; block * kRows < last_.size(); ++block) rowwise().stats({}, before(tile, block), {});
  }

  // R W, after the last block, whose memory goes first: the slabs' parts of Phi take its place.
  SlabFeatures product() {
    for_tasks(
        p_.cut.tiles, [] { return 0; },
        [&](int, int64_t tile) {
          open(tile);
          close(tile, 0);
        });
    workers_.clear();
    kept_ = Buffer();
    SlabFeatures slabs(p_, r_);
    struct State {
      ColumnPanels panel;
      ResidualProduct product;
    };
    for_tasks(
        p_.cut.slabs,
        [&] { return State{ColumnPanels(p_.format, p_.depth, p_.cut.width), ResidualProduct(p_, r_.padded())}; },
        [&](State& s, int64_t slab) {
          float* out = slabs.clear(slab);
          for (int64_t tile = p_.cut.slab_begin(slab); tile < p_.cut.slab_begin(slab + 1); ++tile) {
            const int64_t first = tile * p_.cut.width;
            s.panel.pack(p_.weight, first, /*transposed=*/false, /*straight=*/true);
            s.product.add(p_, residual(tile), s.panel, out, slabs.totals(slab),
                          p_.rows_soon(first + p_.cut.width, p_.cut.width));
          }
        });
    return slabs;
  }

 private:
  struct Worker {
    LogitTile logits;
    RunningSums sums;
  };

  // A thread's buffers, made once: fresh memory per block would cost page faults.
  Worker* worker(int64_t i) {
    if (!workers_[i]) workers_[i].reset(new Worker{LogitTile(p_), RunningSums(block_)});
    return workers_[i].get();
  }

  float* residual(int64_t tile) const { return residual_.floats() + tile * r_.padded() * p_.cut.width; }

  const HeadProblem& p_;
  const Responses& r_;
  const int64_t block_;
  std::vector<Token>& tokens_;
  Coefficients coef_;
  TileScales scales_;
  Buffer kept_;      // [tile][block][width]
  Buffer residual_;  // R, [tile][response][width]
  std::vector<std::unique_ptr<Worker>> workers_;
  Span last_;
};

}  // namespace

void kept_features(const HeadProblem& p, const Responses& all, const KeptPlan& plan, const TokenStats& stats,
                   float* features) {
  std::vector<Token> tokens(p.N);
  for_groups(all, plan.responses, [&](const Responses& r) {
    const int64_t block = even_block(r.token_end() - r.token_begin(), plan.tokens);
    KeptPass pass(p, r, block, tokens);
    for (int64_t t = r.token_begin(); t < r.token_end(); t += block)
      pass.statistics({t, std::min(t + block, r.token_end())}, stats);
    finish_features(p, r, tokens, pass.product(), features);
  });
}

}  // namespace g2rl
