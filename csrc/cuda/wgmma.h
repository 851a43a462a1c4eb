// d [64, N] (+)= a [64, 16] b [N, 16]^T for one warpgroup: wgmma for every multiple of 16 up to 192 columns.
//
// PTX names every register of d one by one, so the lists below grow by what 16 columns add: eight registers.
#pragma once

#include "platform.h"

namespace g2rl::cuda::sm90 {

#ifdef __CUDACC__

// clang-format off
#define G2RL_NAMES_16 "%0, %1, %2, %3, %4, %5, %6, %7"
#define G2RL_REGISTERS_16 "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define G2RL_NAMES_32 G2RL_NAMES_16 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define G2RL_REGISTERS_32 G2RL_REGISTERS_16, "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define G2RL_NAMES_48 G2RL_NAMES_32 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define G2RL_REGISTERS_48 G2RL_REGISTERS_32, "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23])
#define G2RL_NAMES_64 G2RL_NAMES_48 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define G2RL_REGISTERS_64 G2RL_REGISTERS_48, "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define G2RL_NAMES_80 G2RL_NAMES_64 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define G2RL_REGISTERS_80 G2RL_REGISTERS_64, "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35]), "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39])
#define G2RL_NAMES_96 G2RL_NAMES_80 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define G2RL_REGISTERS_96 G2RL_REGISTERS_80, "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43]), "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47])
#define G2RL_NAMES_112 G2RL_NAMES_96 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define G2RL_REGISTERS_112 G2RL_REGISTERS_96, "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51]), "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55])
#define G2RL_NAMES_128 G2RL_NAMES_112 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define G2RL_REGISTERS_128 G2RL_REGISTERS_112, "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59]), "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define G2RL_NAMES_144 G2RL_NAMES_128 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define G2RL_REGISTERS_144 G2RL_REGISTERS_128, "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67]), "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71])
#define G2RL_NAMES_160 G2RL_NAMES_144 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define G2RL_REGISTERS_160 G2RL_REGISTERS_144, "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75]), "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79])
#define G2RL_NAMES_176 G2RL_NAMES_160 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define G2RL_REGISTERS_176 G2RL_REGISTERS_160, "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83]), "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87])
#define G2RL_NAMES_192 G2RL_NAMES_176 ", %88, %89, %90, %91, %92, %93, %94, %95"
#define G2RL_REGISTERS_192 G2RL_REGISTERS_176, "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91]), "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95])
// clang-format on

// A, B, ADD: the numbers that the operands after N / 2 registers have.
#define G2RL_WGMMA(N, TYPE, NAME, A, B, ADD)                                                           \
  template <>                                                                                          \
  struct Wgmma<TYPE, N> {                                                                              \
    template <int R>                                                                                   \
    static DEVICE void issue(float (&d)[R], uint64_t a, uint64_t b, int add) {                         \
      asm volatile("{ .reg .pred add; setp.ne.b32 add, %" ADD                                          \
                   ", 0;\n"                                                                            \
                   "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." NAME "." NAME " {" G2RL_NAMES_##N \
                   "}, %" A ", %" B ", add, 1, 1, 0, 0; }"                                             \
                   : G2RL_REGISTERS_##N                                                                \
                   : "l"(a), "l"(b), "r"(add));                                                        \
    }                                                                                                  \
  };
#define G2RL_WGMMAS(N, A, B, ADD)        \
  G2RL_WGMMA(N, bf16, "bf16", A, B, ADD) \
  G2RL_WGMMA(N, fp16, "f16", A, B, ADD)

template <class T, int N>
struct Wgmma;

G2RL_WGMMAS(16, "8", "9", "10")
G2RL_WGMMAS(32, "16", "17", "18")
G2RL_WGMMAS(48, "24", "25", "26")
G2RL_WGMMAS(64, "32", "33", "34")
G2RL_WGMMAS(80, "40", "41", "42")
G2RL_WGMMAS(96, "48", "49", "50")
G2RL_WGMMAS(112, "56", "57", "58")
G2RL_WGMMAS(128, "64", "65", "66")
G2RL_WGMMAS(144, "72", "73", "74")
G2RL_WGMMAS(160, "80", "81", "82")
G2RL_WGMMAS(176, "88", "89", "90")
G2RL_WGMMAS(192, "96", "97", "98")

template <class T, int N, int R>
DEVICE void wgmma(float (&d)[R], uint64_t a, uint64_t b, bool add) {
  static_assert(R >= N / 2);
  Wgmma<T, N>::issue(d, a, b, add);
}

#endif

}  // namespace g2rl::cuda::sm90
