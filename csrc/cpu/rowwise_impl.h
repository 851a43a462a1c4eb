// Bodies of the functions in rowwise.h. Included once per instruction set, by a file that defines G2RL_ISA and is
// compiled for it.
//
// All that such a file compiles is its own, without templates and inline functions of the standard library: of one that
// several files have, a linker keeps any, and its instructions may be more than the processor has.
#include <cmath>
#include <cstring>

#include "dots_impl.h"
#include "rowwise.h"
#include "simd.h"

#if defined(__AMX_BF16__)
#include "amx.h"
#else
#include "register_tiles.h"
#endif

namespace g2rl {
namespace G2RL_ISA {
namespace {

void logits(const Tile& t, const LogitMap& map, float* dcap) {
  for (int r = 0; r < t.rows; ++r) {
    float* row = t.acc + r * t.ld;
    for (int c = 0; c < t.width; c += kLanes) {
      const f32x16 x = load(row + c) * map.alpha + load(map.bias + c);
      if (map.cap_over_t == 0.0f) {
        store(row + c, x);
        continue;
      }
      // tanh and its derivative from one exponential; 1 - tanh^2 itself would cancel where the cap saturates.
      const f32x16 q = exp(abs(x) * -2.0f);
      const f32x16 inv = 1.0f / (1.0f + q);
      store(row + c, unless_nan(copysign((1.0f - q) * inv, x) * map.cap_over_t, x));
      if (dcap) store(dcap + r * t.ld + c, 4.0f * q * inv * inv);
    }
  }
}

void lane_sums(const float* lanes, int64_t n, float* out) {
  for (int64_t i = 0; i < n; ++i) out[i] = sum(load(lanes + i * kLanes));
}

// The jobs below as work that a product can be interrupted for: kUnit columns of a row per step, row after row.

// The position in a job's rows.
class Walk {
 public:
  Walk(int rows, int width) : width_(width), left_(static_cast<int64_t>(rows) * (width / kUnit)) {}
  int64_t left() const { return left_; }
  int row() const { return row_; }
  int col() const { return col_; }
  bool ends_row() const { return col_ + kUnit == width_; }
  void next() {
    --left_;
    row_ += ends_row();
    col_ = ends_row() ? 0 : col_ + kUnit;
  }

 private:
  int width_, row_ = 0, col_ = 0;
  int64_t left_;
};

// A later entry may exceed ref by this much before the sums are moved: little enough that the entropy keeps its digits.
constexpr float kHeadroom = 16.0f;

constexpr float kLowest = -1.0e38f;  // of references: finite, and so is how far logits lie above it

float row_max(const float* row, int width) {
  f32x16 m = splat(-1.0e30f);
  for (int c = 0; c < width; c += kLanes) m = max(load(row + c), m);
  return max_lane(m);
}

// A float whose low 16 bits hold round(h unit), 0 <= h unit <= kKeptMax, and that number itself.
inline f32x16 with_rounded_bits(f32x16 h, f32x16 unit) { return multiply_add(h, unit, kRound); }
inline f32x16 rounded(f32x16 h, f32x16 unit) { return with_rounded_bits(h, unit) - kRound; }

inline f32x16 unit_of(f32x16 top) { return kKeptMax / exp_in_range(top); }

// The exponential of NaN is anything, its product with NaN is not: what shows in a sum of products is to show in the
// sum.
inline f32x16 zero_or_nan(f32x16 of_products) { return of_products - of_products; }

// Works with halves: exp((u - ref) / 2) is what may be kept, its square what is summed. A row is kept while the next
// one is summed, since the chain from a row's largest entry to its unit is long.
template <bool kKeep>
class StatsWork {
 public:
  explicit StatsWork(const StatsJob& job)
      : job_(job), half_alpha_(0.5f * job.alpha), at_(job.tile.rows + kKeep, job.tile.width) {}
  int64_t left() const { return at_.left(); }

  void step() {
    const bool summing = !kKeep || at_.row() < job_.tile.rows;
    if (summing) {
      if (at_.col() == 0) begin_row();
      add(at_.col());
    }
    if constexpr (kKeep) {
      if (at_.row() > 0) keep(at_.row() - 1, at_.col());
    }
    if (summing && at_.ends_row()) end_row();
    at_.next();
  }

 private:
  const float* acc() const { return job_.tile.acc + at_.row() * job_.tile.ld; }

  void begin_row() {
    s0_ = x0_ = f32x16{};
    if (job_.first) {
      // Of the first columns: what lies further than the headroom above them moves the sums, and is seldom there.
      const float top = job_.alpha * row_max(acc(), kUnit);
      // Of a tile with nothing but the target, where a large alpha takes even the start of a maximum out of range. An
      // infinite reference would make NaN of what it is subtracted from.
      job_.ref[at_.row()] = top == -INFINITY ? kLowest : top;
    } else {
      s0_ = load(job_.sum + at_.row() * kLanes);
      x0_ = load(job_.sum_x + at_.row() * kLanes);
    }
    start_sums();
  }

  void start_sums() {
    half_ref_ = 0.5f * job_.ref[at_.row()];
    s_ = s0_;
    sy_ = f32x16{};
    most_ = splat(0.5f * kExpMin);
  }

  void add(int col) {
    const float* row = acc() + col;
    f32x16 s = s_, sy = sy_, most = most_;
    for (int c = 0; c < kUnit; c += kLanes) {
      const f32x16 y = max(splat(0.5f * kExpMin), multiply_add(load(row + c), half_alpha_, -half_ref_));
      most = max(y, most);
      const f32x16 h = exp_in_range(y);
      if constexpr (kKeep) store(halves_[at_.row() % 2] + col + c, h);
      const f32x16 e = h * h;
      s += e;
      sy += e * y;
    }
    s_ = s, sy_ = sy, most_ = most;
  }

  void end_row() {
    while (__builtin_expect(any_above(most_, 0.5f * kHeadroom), 0)) {
      const float before = job_.ref[at_.row()];
      float& ref = job_.ref[at_.row()];
      ref = job_.alpha * row_max(acc(), job_.tile.width);
      // Logits near 1e9 lie further than the headroom above their own rounded maximum.
      if (ref == before) ref = nextafterf(before, INFINITY);
      const f32x16 up = splat(ref - before);
      // `exp` is never 0, and above masked words `up` is 1e30: their product would count a little for each of them.
      const f32x16 f = ref - before > -kExpMin ? splat(0.0f) : exp(-up);
      x0_ = (x0_ - up * s0_) * f;
      s0_ *= f;
      start_sums();
      for (int c = 0; c < job_.tile.width; c += kUnit) add(c);
    }
    store(job_.sum + at_.row() * kLanes, s_ + zero_or_nan(sy_));
    store(job_.sum_x + at_.row() * kLanes, x0_ + 2.0f * sy_);
    if (!job_.tile_top) return;
    const float top = max_lane(most_);
    job_.tile_ref[at_.row()] = job_.ref[at_.row()];
    job_.tile_top[at_.row()] = top;
    if constexpr (kKeep) unit_ = unit_of(splat(top));
  }

  void keep(int row, int col) {
    uint16_t* out = job_.kept.data + row * job_.kept.ld + col;
    for (int c = 0; c < kUnit; c += kLanes)
      store_low16(out + c, with_rounded_bits(load(halves_[row % 2] + col + c), unit_));
  }

  const StatsJob& job_;
  const float half_alpha_;
  Walk at_;
  float half_ref_ = 0;
  f32x16 s0_{}, x0_{}, s_{}, sy_{}, most_{}, unit_{};
  alignas(64) float halves_[2][kKeep ? kMaxWidth : 1];
};

// Square of a kept number, times its row's coefficient, onto the column sums: one function, so that plans agree to the
// bit.
inline f32x16 add_square(f32x16 total, f32x16 q, f32x16 coef) { return multiply_add(coef, q * q, total); }

class KeptWork {
 public:
  explicit KeptWork(const KeptJob& job) : job_(job), at_(job.rows, job.width) {}
  int64_t left() const { return at_.left(); }

  void step() {
    const uint16_t* q = job_.kept.data + at_.row() * job_.kept.ld + at_.col();
    float* out = job_.out[at_.row()] + at_.col();
    const f32x16 k = splat(job_.coef[at_.row()]);
    for (int c = 0; c < kUnit; c += kLanes) store(out + c, add_square(load(out + c), load_u16(q + c), k));
    at_.next();
  }

 private:
  const KeptJob& job_;
  Walk at_;
};

enum class Exponentials { kRounded, kExact, kSummed };

template <Exponentials kKind>
class ResidualWork {
 public:
  explicit ResidualWork(const ResidualJob& job)
      : job_(job), at_(job.tile.rows, job.tile.width), half_alpha_(0.5f * job.alpha) {}
  int64_t left() const { return at_.left(); }

  void step() {
    const int r = at_.row();
    const float* row = job_.tile.acc + r * job_.tile.ld + at_.col();
    float* out = job_.out[r] + at_.col();
    const f32x16 k = splat(job_.coef[r]);
    if constexpr (kKind == Exponentials::kRounded) {
      const f32x16 unit = splat(job_.unit[r]);
      const float m = 0.5f * job_.ref[r];
      for (int c = 0; c < kUnit; c += kLanes) {
        const f32x16 y = max(multiply_add(load(row + c), half_alpha_, -m), splat(0.5f * kExpMin));
        store(out + c, add_square(load(out + c), rounded(exp_in_range(y), unit), k));
      }
    } else {
      if (kKind == Exponentials::kSummed && at_.col() == 0) {
        s_ = job_.first ? f32x16{} : load(job_.sum + r * kLanes);
        x_ = job_.first ? f32x16{} : load(job_.sum_x + r * kLanes);
      }
      const float* slope = job_.slope ? job_.slope + r * job_.tile.ld + at_.col() : nullptr;
      for (int c = 0; c < kUnit; c += kLanes) {
        // A ref that is no lse of this row must not overflow: the caller sees the sum and starts again.
        const f32x16 x = min(splat(60.0f), max(splat(kExpMin), load(row + c) * job_.alpha - job_.ref[r]));
        f32x16 e = exp_in_range(x);
        if constexpr (kKind == Exponentials::kSummed) {
          s_ += e;
          x_ += e * x;
        }
        if (slope) e *= load(slope + c);
        store(out + c, load(out + c) + k * e);
      }
      if (kKind == Exponentials::kSummed && at_.ends_row()) {
        store(job_.sum + r * kLanes, s_ + zero_or_nan(x_));
        store(job_.sum_x + r * kLanes, x_);
      }
    }
    at_.next();
  }

 private:
  const ResidualJob& job_;
  Walk at_;
  const float half_alpha_;
  f32x16 s_{}, x_{};
};

class GradientWork {
 public:
  explicit GradientWork(const GradientJob& job) : job_(job), at_(job.tile.rows, job.tile.width) {}
  int64_t left() const { return at_.left(); }

  void step() {
    const int r = at_.row();
    const int64_t offset = r * job_.tile.ld + at_.col();
    float* row = job_.tile.acc + offset;
    for (int c = 0; c < kUnit; c += kLanes) {
      const f32x16 x = max(splat(kExpMin), load(row + c) * job_.alpha - job_.lse[r]);
      f32x16 g = exp_in_range(x) * (x * job_.c1[r] + job_.c0[r]);
      if (job_.slope) g *= load(job_.slope + offset + c);
      store(row + c, g);
    }
    at_.next();
  }

 private:
  const GradientJob& job_;
  Walk at_;
};

struct NoWork {
  int64_t left() const { return 0; }
  void step() {}
};

// One after the other.
template <typename First, typename Second>
class Chain {
 public:
  Chain(First& first, Second& second) : first_(first), second_(second) {}
  int64_t left() const { return first_.left() + second_.left(); }
  void step() { first_.left() ? first_.step() : second_.step(); }

 private:
  First& first_;
  Second& second_;
};

#if !defined(__AMX_BF16__)
void enter() {}
void leave() {}
#endif

template <typename Work>
void perform(Work&& work, const TileProduct& meanwhile) {
#if defined(__AMX_BF16__)
  if (meanwhile.rows > 0) multiply_while(meanwhile, work);
#endif
  while (work.left()) work.step();
#if !defined(__AMX_BF16__)
  if (meanwhile.rows > 0) multiply_tiles(meanwhile);
#endif
}

void multiply(const TileProduct& product) { perform(NoWork{}, product); }

template <bool kKeep>
void stats_and_kept(const StatsJob& job, const KeptJob& before, const TileProduct& meanwhile) {
  KeptWork first(before);
  StatsWork<kKeep> second(job);
  perform(Chain(first, second), meanwhile);
}

void stats(const StatsJob& job, const KeptJob& before, const TileProduct& meanwhile) {
  (job.kept.data ? stats_and_kept<true> : stats_and_kept<false>)(job, before, meanwhile);
}

void residual(const ResidualJob& job, const TileProduct& meanwhile) {
  if (job.rounded) {
    perform(ResidualWork<Exponentials::kRounded>(job), meanwhile);
  } else if (job.sum) {
    perform(ResidualWork<Exponentials::kSummed>(job), meanwhile);
  } else {
    perform(ResidualWork<Exponentials::kExact>(job), meanwhile);
  }
}

void gradient(const GradientJob& job, const TileProduct& meanwhile) { perform(GradientWork(job), meanwhile); }

void column_sums(const Tile& t, float* out) {
  for (int r = 0; r < t.rows; ++r)
    for (int c = 0; c < t.width; c += kLanes) store(out + c, load(out + c) + load(t.acc + r * t.ld + c));
}

void kept_scales(int rows, const float* ref, const float* top, const float* lse, const float* value, float* unit,
                 float* coef) {
  alignas(64) float in[4][kLanes], u[kLanes], k[kLanes];
  for (int r = 0; r < rows; r += kLanes) {
    const int n = rows - r < kLanes ? rows - r : kLanes;
    std::memset(in, 0, sizeof(in));
    const float* from[4] = {ref + r, top + r, lse + r, value + r};
    for (int i = 0; i < 4; ++i) std::memcpy(in[i], from[i], n * sizeof(float));
    store(u, unit_of(load(in[1])));
    // ref - lse first: both are near each other and may be large.
    const f32x16 lead = (load(in[0]) - load(in[2])) + 2.0f * load(in[1]);
    store(k, exp(min(lead, splat(80.0f))) * load(in[3]) * (1.0f / (kKeptMax * kKeptMax)));
    std::memcpy(unit + r, u, n * sizeof(float));
    std::memcpy(coef + r, k, n * sizeof(float));
  }
}

inline float from_bits(uint32_t b) {
  float x;
  std::memcpy(&x, &b, sizeof(x));
  return x;
}

inline uint32_t to_bits(float x) {
  uint32_t b;
  std::memcpy(&b, &x, sizeof(b));
  return b;
}

inline uint16_t round_bf16(float x) {
  const uint32_t b = to_bits(x);
  if ((b & 0x7fffffff) > 0x7f800000) return static_cast<uint16_t>((b >> 16) | 0x40);  // a carry could lose a NaN
  return static_cast<uint16_t>((b + 0x7fff + ((b >> 16) & 1)) >> 16);
}

inline float widen_bf16(uint16_t h) { return from_bits(static_cast<uint32_t>(h) << 16); }

// fp16 bits -> float. Integer arithmetic up to the last step: a subnormal half must survive a thread that flushes
// subnormal floats.
inline float widen_half(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(h & 0x7fff) << 13;
  const uint32_t exponent = h & 0x7c00;
  const uint32_t rebased = magnitude + ((exponent == 0x7c00 ? 224u : 112u) << 23);
  const float subnormal = from_bits(magnitude + (113u << 23)) - from_bits(113u << 23);
  return from_bits((exponent == 0 ? to_bits(subnormal) : rebased) | sign);
}

// Constant counts and one array per part let the compiler vectorise the loop.
template <int kParts, typename Number>
void split_numbers(const Number& number, int64_t n, uint16_t* const* dst) {
  uint16_t* __restrict a = dst[0];
  uint16_t* __restrict b = kParts > 1 ? dst[1] : nullptr;
  uint16_t* __restrict c = kParts > 2 ? dst[2] : nullptr;
  for (int64_t i = 0; i < n; ++i) {
    float x = number(i);
    a[i] = round_bf16(x);
    if constexpr (kParts > 1) b[i] = round_bf16(x -= widen_bf16(a[i]));
    if constexpr (kParts > 2) c[i] = round_bf16(x - widen_bf16(b[i]));
  }
}

void split(const void* src, Dtype dtype, int64_t n, int parts, uint16_t* const* dst) {
  const auto half = [s = static_cast<const uint16_t*>(src)](int64_t i) { return widen_half(s[i]); };
  const auto full = [s = static_cast<const float*>(src)](int64_t i) { return s[i]; };
  if (dtype == Dtype::kBFloat16) {
    std::memcpy(dst[0], src, n * sizeof(uint16_t));
  } else if (dtype == Dtype::kHalf) {
    split_numbers<2>(half, n, dst);
  } else if (parts == 1) {
    split_numbers<1>(full, n, dst);
  } else if (parts == 2) {
    split_numbers<2>(full, n, dst);
  } else {
    split_numbers<3>(full, n, dst);
  }
}

void widen(const void* src, Dtype dtype, int64_t n, float* dst) {
  const uint16_t* s = static_cast<const uint16_t*>(src);
  if (dtype == Dtype::kFloat) {
    std::memcpy(dst, src, n * sizeof(float));
  } else if (dtype == Dtype::kBFloat16) {
    for (int64_t i = 0; i < n; ++i) dst[i] = widen_bf16(s[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) dst[i] = widen_half(s[i]);
  }
}

#define G2RL_ROTATE_LOW 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23
#define G2RL_ROTATE_HIGH 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31

// Round to nearest even, overflow to infinity as PyTorch's own casts do.
inline uint16_t round_half(float x) {
  const uint32_t bits = to_bits(x), sign = (bits >> 16) & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude >= 0x47800000) return static_cast<uint16_t>(sign | (magnitude > 0x7f800000 ? 0x7e00 : 0x7c00));
  if (magnitude < 0x38800000) {  // subnormal: let an addition do the rounding
    const uint32_t rounded = to_bits(from_bits(magnitude) + 0.5f) - to_bits(0.5f);
    return static_cast<uint16_t>(sign | rounded);
  }
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13));
}

void narrow(const float* src, Dtype dtype, int64_t n, void* dst) {
  uint16_t* out = static_cast<uint16_t*>(dst);
  if (dtype == Dtype::kFloat) {
    std::memcpy(dst, src, n * sizeof(float));
  } else if (dtype == Dtype::kBFloat16) {
    for (int64_t i = 0; i < n; ++i) out[i] = round_bf16(src[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = round_half(src[i]);
  }
}

using u32x16 = uint32_t __attribute__((vector_size(64)));

#if __has_builtin(__builtin_shufflevector)
#define G2RL_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else  // GCC before 12
#define G2RL_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, u32x16{__VA_ARGS__})
#endif

// Four rounds of perfect shuffles: row i meets row i + 8 each time, and after log2(16) rounds rows and columns have
// changed places.
inline void transpose_block(u32x16* a) {
  u32x16 b[16];
  for (int round = 0; round < 2; ++round) {
    for (int i = 0; i < 8; ++i) {
      b[2 * i] = G2RL_SHUFFLE(a[i], a[i + 8], G2RL_ROTATE_LOW);
      b[2 * i + 1] = G2RL_SHUFFLE(a[i], a[i + 8], G2RL_ROTATE_HIGH);
    }
    for (int i = 0; i < 8; ++i) {
      a[2 * i] = G2RL_SHUFFLE(b[i], b[i + 8], G2RL_ROTATE_LOW);
      a[2 * i + 1] = G2RL_SHUFFLE(b[i], b[i + 8], G2RL_ROTATE_HIGH);
    }
  }
}

void transpose16(const uint32_t* const* src, int64_t n, uint32_t* dst, int64_t ld) {
  u32x16 block[16];
  for (int64_t c = 0; c < n; c += kLanes) {
    for (int r = 0; r < 16; ++r) std::memcpy(&block[r], src[r] + c, sizeof(u32x16));
    transpose_block(block);
    for (int r = 0; r < 16; ++r) std::memcpy(dst + (c + r) * ld, &block[r], sizeof(u32x16));
  }
}

void interleave(const uint16_t* a, const uint16_t* b, int64_t n, uint32_t* dst, int64_t ld) {
  for (int64_t c = 0; c < n; c += kLanes, dst += ld)
    for (int i = 0; i < kLanes; ++i) dst[i] = static_cast<uint32_t>(a[c + i]) | static_cast<uint32_t>(b[c + i]) << 16;
}

}  // namespace

const RowKernels& table() {
  // fp32 has 24 bits, fp16 11, a part 8.
#if defined(__AMX_BF16__)
#define G2RL_BF16_PARTS {3, 1, 2}
#elif defined(G2RL_BF16_PAIRS)
#define G2RL_BF16_PARTS {0, 1, 0}
#else
#define G2RL_BF16_PARTS {0, 0, 0}
#endif
  static const RowKernels kernels{G2RL_BF16_PARTS, enter,       leave,       multiply,    stats,      residual,
                                  gradient,        logits,      kept_scales, column_sums, split,      widen,
                                  narrow,          transpose16, lane_sums,   interleave,  fp64::kDots};
  return kernels;
}

}  // namespace G2RL_ISA
}  // namespace g2rl
