// What every C++ test reports by.
#pragma once

#include <cstdio>
#include <cstdlib>
#include <string>

namespace g2rl::testing {

inline int failures = 0;

inline void expect(bool ok, const std::string& what, double found, double limit) {
  if (ok) return;
  std::fprintf(stderr, "FAILED %s: found %.9g, limit %.9g\n", what.c_str(), found, limit);
  if (++failures == 20) std::exit(1);  // enough
}

// What main returns.
inline int outcome() {
  std::puts(failures ? "failed" : "ok");
  return failures != 0;
}

}  // namespace g2rl::testing
