// Bodies of the functions in rowwise.h. Included once per instruction set, by a file that defines G2RL_ISA and is compiled for it.
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "rowwise.h"
#include "simd.h"

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
      store(row + c, copysign((1.0f - q) * inv, x) * map.cap_over_t);
      if (dcap) store(dcap + r * t.ld + c, 4.0f * q * inv * inv);
    }
    for (int c = t.cols; c < t.width; ++c) row[c] = -std::numeric_limits<float>::infinity();
  }
}

// A later entry may exceed ref by this much before the sums are moved: little enough that the entropy keeps its digits.
constexpr float kHeadroom = 16.0f;
float row_max(const float* row, int width) {
  f32x16 m = splat(-1.0e30f);
  for (int c = 0; c < width; c += kLanes) m = max(m, load(row + c));
  return max_lane(m);
}

// A float whose low 16 bits hold round(h unit), 0 <= h unit <= kKeptMax, and that number itself.
inline f32x16 with_rounded_bits(f32x16 h, f32x16 unit) { return h * unit + kRound; }
inline f32x16 rounded(f32x16 h, f32x16 unit) { return with_rounded_bits(h, unit) - kRound; }

inline f32x16 unit_of(f32x16 top) { return kKeptMax / exp_in_range(top); }

// Up to 16 rows of exp((u - ref) / 2), kMaxWidth apart, with their largest (u - ref) / 2, into rows begin..end of `kept`.
void keep_rows(int width, int begin, int end, const float* halves, const float* tops, Kept kept) {
  alignas(64) float units[kLanes];
  store(units, unit_of(load(tops)));
  for (int r = begin; r < end; ++r) {
    const f32x16 unit = splat(units[r - begin]);
    const float* half = halves + (r - begin) * kMaxWidth;
    uint16_t* out = kept.data + r * kept.ld;
    for (int c = 0; c < width; c += kLanes) store_low16(out + c, with_rounded_bits(load(half + c), unit));
  }
}

// Works with halves: exp((u - ref) / 2) is what may be kept, its square what is summed. Rows are kept 16 at a time, since the chain from a row's
// largest to its unit is long.
template <bool kTop, bool kKeep>
void stats_of(const Tile& t, float alpha, bool first, float* ref, float* sum, float* sum_x, float* top, Kept kept) {
  const float half_alpha = 0.5f * alpha;
  const f32x16 lowest = splat(0.5f * kExpMin);
  alignas(64) float halves[kKeep ? kLanes * kMaxWidth : 1], tops[kLanes] = {};
  for (int r = 0; r < t.rows; ++r) {
    const float* row = t.acc + r * t.ld;
    float* half = halves + (kKeep ? r % kLanes * kMaxWidth : 0);
    f32x16 s0{}, x0{};
    if (first) {
      ref[r] = alpha * row_max(row, t.width);
    } else {
      s0 = load(sum + r * kLanes);
      x0 = load(sum_x + r * kLanes);
    }
    f32x16 most;
    for (;;) {
      const float m = 0.5f * ref[r];
      f32x16 s = s0, sy{};
      most = lowest;
      for (int c = 0; c < t.width; c += kLanes) {
        const f32x16 y = max(load(row + c) * half_alpha - m, lowest);
        most = max(most, y);
        const f32x16 h = exp_in_range(y);
        if constexpr (kKeep) store(half + c, h);
        const f32x16 e = h * h;
        s += e;
        sy += e * y;
      }
      if (__builtin_expect(!any_above(most, 0.5f * kHeadroom), 1)) {
        store(sum + r * kLanes, s);
        store(sum_x + r * kLanes, x0 + 2.0f * sy);
        break;
      }
      ref[r] = alpha * row_max(row, t.width);
      const f32x16 up = splat(ref[r] - 2.0f * m);
      const f32x16 f = exp(-up);
      x0 = (x0 - up * s0) * f;
      s0 *= f;
    }
    if constexpr (kTop) top[r] = tops[r % kLanes] = max_lane(most);
    if constexpr (kKeep) {
      if (r % kLanes == kLanes - 1 || r == t.rows - 1) keep_rows(t.width, r / kLanes * kLanes, r + 1, halves, tops, kept);
    }
  }
}

void stats(const Tile& t, float alpha, bool first, float* ref, float* sum, float* sum_x, float* top, Kept kept) {
  (kept.data ? stats_of<true, true> : top ? stats_of<true, false> : stats_of<false, false>)(t, alpha, first, ref, sum, sum_x, top, kept);
}

void exponentials(const Tile& t, float alpha, bool first, const float* ref, float* sum, float* sum_x) {
  for (int r = 0; r < t.rows; ++r) {
    float* row = t.acc + r * t.ld;
    const float m = ref[r];
    f32x16 s{}, sx{};
    if (!first) {
      s = load(sum + r * kLanes);
      sx = load(sum_x + r * kLanes);
    }
    for (int c = 0; c < t.width; c += kLanes) {
      // A ref that is no lse of this row must not overflow: the caller sees the sum and starts again.
      const f32x16 x = min(max(load(row + c) * alpha - m, splat(kExpMin)), splat(60.0f));
      const f32x16 e = exp_in_range(x);
      store(row + c, e);
      s += e;
      sx += e * x;
    }
    store(sum + r * kLanes, s);
    store(sum_x + r * kLanes, sx);
  }
}

float lane_sum(const float* lanes) { return sum(load(lanes)); }

// For groups of 256 columns, 64, then 16: f(columns as a constant, first column).
template <int kMost, typename F>
void for_columns(int width, const F& f) {
  int c = 0;
  if constexpr (kMost == 16) {
    for (; c + 16 * kLanes <= width; c += 16 * kLanes) f(std::integral_constant<int, 16>{}, c);
  }
  for (; c + 4 * kLanes <= width; c += 4 * kLanes) f(std::integral_constant<int, 4>{}, c);
  for (; c < width; c += kLanes) f(std::integral_constant<int, 1>{}, c);
}

// kVectors columns of 16 at a time stay in registers while the rows go by.
template <int kVectors, bool kExp, bool kCap>
void column_sum(const Tile& t, int c, float alpha, const float* ref, const float* coef, const float* dcap, float* out) {
  f32x16 total[kVectors];
  for (int j = 0; j < kVectors; ++j) total[j] = load(out + c + j * kLanes);
  for (int r = 0; r < t.rows; ++r) {
    const float* row = t.acc + r * t.ld + c;
    const f32x16 k = splat(coef[r]);
    for (int j = 0; j < kVectors; ++j) {
      f32x16 e = load(row + j * kLanes);
      if constexpr (kExp) e = exp(e * alpha - ref[r]);
      if constexpr (kCap) e *= load(dcap + r * t.ld + c + j * kLanes);
      total[j] += k * e;
    }
  }
  for (int j = 0; j < kVectors; ++j) store(out + c + j * kLanes, total[j]);
}

template <bool kExp, bool kCap>
void column_sums(const Tile& t, float alpha, const float* ref, const float* coef, const float* dcap, float* out) {
  for_columns<4>(t.width, [&](auto vectors, int c) { column_sum<vectors, kExp, kCap>(t, c, alpha, ref, coef, dcap, out); });
}

// Square of a kept number, times its row's coefficient, onto the column sums: one function, so that plans agree to the bit.
inline f32x16 add_square(f32x16 total, f32x16 q, f32x16 coef) { return total + coef * (q * q); }

void rounded_residual(const Tile& t, float alpha, const float* ref, const float* unit, const float* coef, float* out) {
  for_columns<4>(t.width, [&, half_alpha = 0.5f * alpha](auto vectors, int c) {
    f32x16 total[vectors];
    for (int j = 0; j < vectors; ++j) total[j] = load(out + c + j * kLanes);
    for (int r = 0; r < t.rows; ++r) {
      const float* row = t.acc + r * t.ld + c;
      const float m = 0.5f * ref[r];
      const f32x16 k = splat(coef[r]), scale = splat(unit[r]);
      for (int j = 0; j < vectors; ++j) {
        const f32x16 y = max(load(row + j * kLanes) * half_alpha - m, splat(0.5f * kExpMin));
        total[j] = add_square(total[j], rounded(exp_in_range(y), scale), k);
      }
    }
    for (int j = 0; j < vectors; ++j) store(out + c + j * kLanes, total[j]);
  });
}

// Whole rows at a time read memory in order; 16 sums fit AVX-512's registers.
constexpr int kMostColumns = kWide ? 16 : 4;
void kept_residual(Kept kept, int rows, int width, const float* coef, float* out) {
  for_columns<kMostColumns>(width, [&](auto vectors, int c) {
    f32x16 total[vectors];
    for (int j = 0; j < vectors; ++j) total[j] = load(out + c + j * kLanes);
    for (int r = 0; r < rows; ++r) {
      const uint16_t* row = kept.data + r * kept.ld + c;
      const f32x16 k = splat(coef[r]);
      for (int j = 0; j < vectors; ++j) total[j] = add_square(total[j], load_u16(row + j * kLanes), k);
    }
    for (int j = 0; j < vectors; ++j) store(out + c + j * kLanes, total[j]);
  });
}

void kept_scales(int rows, const float* ref, const float* top, const float* lse, const float* value, float* unit, float* coef) {
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

void residual(const Tile& t, float alpha, const float* ref, const float* coef, const float* dcap, float* out) {
  dcap ? column_sums<true, true>(t, alpha, ref, coef, dcap, out) : column_sums<true, false>(t, alpha, ref, coef, dcap, out);
}

void weighted_sum(const Tile& t, const float* coef, const float* dcap, float* out) {
  dcap ? column_sums<false, true>(t, 1.0f, nullptr, coef, dcap, out) : column_sums<false, false>(t, 1.0f, nullptr, coef, dcap, out);
}

void gradient(const Tile& t, float alpha, const float* lse, const float* c0, const float* c1, const float* slope) {
  for (int r = 0; r < t.rows; ++r) {
    float* row = t.acc + r * t.ld;
    for (int c = 0; c < t.width; c += kLanes) {
      const f32x16 x = max(load(row + c) * alpha - lse[r], splat(kExpMin));
      f32x16 g = exp_in_range(x) * (x * c1[r] + c0[r]);
      if (slope) g *= load(slope + r * t.ld + c);
      store(row + c, g);
    }
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
  return static_cast<uint16_t>((b + 0x7fff + ((b >> 16) & 1)) >> 16);
}

inline float widen_bf16(uint16_t h) { return from_bits(static_cast<uint32_t>(h) << 16); }

// fp16 bits -> float. Integer arithmetic up to the last step: a subnormal half must survive a thread that flushes subnormal floats.
inline float widen_half(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(h & 0x7fff) << 13;
  const uint32_t exponent = h & 0x7c00;
  const uint32_t rebased = magnitude + ((exponent == 0x7c00 ? 224u : 112u) << 23);
  const float subnormal = from_bits(magnitude + (113u << 23)) - from_bits(113u << 23);
  return from_bits((exponent == 0 ? to_bits(subnormal) : rebased) | sign);
}

template <typename Read>
void split_with(Read value, int64_t n, int parts, uint16_t* const* dst) {
  for (int64_t i = 0; i < n; ++i) {
    float rest = value(i);
    for (int p = 0; p < parts; ++p) {
      const uint16_t h = round_bf16(rest);
      dst[p][i] = h;
      rest -= widen_bf16(h);
    }
  }
}

void split(const void* src, Dtype dtype, int64_t n, int parts, uint16_t* const* dst) {
  if (dtype == Dtype::kBFloat16) {
    std::memcpy(dst[0], src, n * sizeof(uint16_t));
    for (int p = 1; p < parts; ++p) std::memset(dst[p], 0, n * sizeof(uint16_t));
    return;
  }
  // Constant counts and one array per part let the compiler vectorise the loop.
  uint16_t *__restrict a = dst[0], *__restrict b = parts > 1 ? dst[1] : nullptr, *__restrict c = parts > 2 ? dst[2] : nullptr;
  if (dtype == Dtype::kHalf && parts == 2) {
    const uint16_t* s = static_cast<const uint16_t*>(src);
    for (int64_t i = 0; i < n; ++i) {
      const float x = widen_half(s[i]);
      a[i] = round_bf16(x);
      b[i] = round_bf16(x - widen_bf16(a[i]));
    }
  } else if (dtype == Dtype::kFloat && parts == 3) {
    const float* s = static_cast<const float*>(src);
    for (int64_t i = 0; i < n; ++i) {
      const float x = s[i];
      a[i] = round_bf16(x);
      const float y = x - widen_bf16(a[i]);
      b[i] = round_bf16(y);
      c[i] = round_bf16(y - widen_bf16(b[i]));
    }
  } else if (dtype == Dtype::kFloat && parts == 1) {
    const float* s = static_cast<const float*>(src);
    for (int64_t i = 0; i < n; ++i) a[i] = round_bf16(s[i]);
  } else if (dtype == Dtype::kFloat && parts == 2) {
    const float* s = static_cast<const float*>(src);
    for (int64_t i = 0; i < n; ++i) {
      const float x = s[i];
      a[i] = round_bf16(x);
      b[i] = round_bf16(x - widen_bf16(a[i]));
    }
  } else if (dtype == Dtype::kFloat) {
    const float* s = static_cast<const float*>(src);
    split_with([s](int64_t i) { return s[i]; }, n, parts, dst);
  } else {
    const uint16_t* s = static_cast<const uint16_t*>(src);
    split_with([s](int64_t i) { return widen_half(s[i]); }, n, parts, dst);
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

// Four rounds of perfect shuffles: row i meets row i + 8 each time, and after log2(16) rounds rows and columns have changed places.
inline void transpose_block(u32x16* a) {
  u32x16 b[16];
  for (int round = 0; round < 2; ++round) {
    for (int i = 0; i < 8; ++i) {
      b[2 * i] = __builtin_shufflevector(a[i], a[i + 8], G2RL_ROTATE_LOW);
      b[2 * i + 1] = __builtin_shufflevector(a[i], a[i + 8], G2RL_ROTATE_HIGH);
    }
    for (int i = 0; i < 8; ++i) {
      a[2 * i] = __builtin_shufflevector(b[i], b[i + 8], G2RL_ROTATE_LOW);
      a[2 * i + 1] = __builtin_shufflevector(b[i], b[i + 8], G2RL_ROTATE_HIGH);
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

void interleave(const uint16_t* a, const uint16_t* b, int64_t n, uint16_t* dst) {
  uint32_t* out = reinterpret_cast<uint32_t*>(dst);
  for (int64_t i = 0; i < n; ++i) out[i] = static_cast<uint32_t>(a[i]) | static_cast<uint32_t>(b[i]) << 16;
}

}  // namespace

const RowKernels& table() {
  static const RowKernels kernels{G2RL_ISA_NAME, logits, stats, exponentials, residual, rounded_residual, kept_residual, kept_scales, weighted_sum, gradient, split, widen, narrow, transpose16, lane_sum, interleave};
  return kernels;
}

}  // namespace G2RL_ISA
}  // namespace g2rl
