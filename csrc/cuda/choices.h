// Run-time choices as compile-time ones: calls f with an integral constant, or with a number of the chosen type.
#pragma once

#include <type_traits>

#include "head.h"

namespace g2rl::cuda {

template <class F>
int choose(bool flag, F&& f) {
  return flag ? f(std::true_type{}) : f(std::false_type{});
}

template <class F>
int choose(Dtype dtype, F&& f) {
  switch (dtype) {
    case Dtype::bf16:
      return f(bf16{});
    case Dtype::fp16:
      return f(fp16{});
    default:
      return f(float{});
  }
}

}  // namespace g2rl::cuda
