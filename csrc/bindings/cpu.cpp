// Python bindings of the CPU kernels: the structs and functions of csrc/cpu/head.h and groups.h under their own names.
// Pointers are integers, so that neither torch's headers nor its libraries are needed, and one build serves every
// torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../cpu/groups.h"
#include "../cpu/head.h"
#include "../cpu/isa.h"
#include "../cpu/parallel.h"

namespace py = pybind11;
using namespace g2rl;

namespace {

using Address = uintptr_t;

// Another build of these kernels may be in the process, whose types would count as defined twice.
const py::module_local local;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// Calls a kernel without Python's lock, on so many threads.
template <class Kernel>
void on_threads_of(int threads, const Kernel& kernel) {
  const py::gil_scoped_release release;
  const Threads of_call(threads);
  kernel();
}

void bind_head(py::module_& m) {
  py::enum_<Dtype>(m, "Dtype", local)
      .value("float32", Dtype::kFloat)
      .value("bfloat16", Dtype::kBFloat16)
      .value("float16", Dtype::kHalf);
  py::class_<Matrix>(m, "Matrix", local)
      .def(py::init([](Address data, int64_t rows, int64_t cols, int64_t row_bytes, Dtype dtype) {
        return Matrix{at<char>(data), rows, cols, row_bytes, dtype};
      }));
  py::class_<Head>(m, "Head", local)
      .def(py::init([](const Matrix& weight, Address bias, double temperature, double logit_scale, double softcap) {
        return Head{weight, at<double>(bias), temperature, logit_scale, softcap};
      }));
  py::class_<Tokens>(m, "Tokens", local).def(py::init([](const Matrix& hidden, Address targets) {
    return Tokens{hidden, at<int64_t>(targets)};
  }));
  py::class_<TokenStats>(m, "TokenStats", local).def(py::init([](Address logps, Address entropy, Address lse) {
    return TokenStats{at<float>(logps), at<float>(entropy), at<float>(lse)};
  }));
  py::class_<Batch>(m, "Batch", local).def(py::init([](Address cu_seqlens, int64_t B, Address token_weights) {
    return Batch{at<int64_t>(cu_seqlens), B, at<float>(token_weights)};
  }));
  py::class_<Gradients>(m, "Gradients", local).def(py::init([](Address hidden, Address weight, Address bias) {
    return Gradients{at<void>(hidden), at<void>(weight), at<float>(bias)};
  }));

  m.def("token_logprobs", [](const Tokens& tokens, const Head& head, const TokenStats& stats, int threads) {
    on_threads_of(threads, [&] { token_logprobs(tokens, head, stats); });
  });
  m.def("sequence_features", [](const Tokens& tokens, const Head& head, const Batch& batch, Address lse,
                                int64_t workspace_bytes, Address features, const TokenStats& stats, int threads) {
    on_threads_of(threads, [&] {
      sequence_features(tokens, head, batch, at<float>(lse), workspace_bytes, at<float>(features), stats);
    });
  });
  m.def("token_sums", [](const Tokens& tokens, const Head& head, Address sums, int threads) {
    on_threads_of(threads, [&] { token_sums(tokens, head, at<float>(sums)); });
  });
  m.def("part_features", [](const Tokens& tokens, const Head& head, const Batch& batch, Address sums, int64_t parts,
                            int64_t workspace_bytes, Address features, const TokenStats& stats, int threads) {
    on_threads_of(threads, [&] {
      part_features(tokens, head, batch, at<float>(sums), parts, workspace_bytes, at<float>(features), stats);
    });
  });
  m.def("logprobs_backward", [](Address grad_logps, Address grad_entropy, const Tokens& tokens, const Head& head,
                                const TokenStats& stats, int64_t workspace_bytes, const Gradients& out, int threads) {
    on_threads_of(threads, [&] {
      logprobs_backward(at<float>(grad_logps), at<float>(grad_entropy), tokens, head, stats, workspace_bytes, out);
    });
  });
}

void bind_groups(py::module_& m) {
  py::class_<Shaping>(m, "Shaping", local)
      .def(
          py::init([](double strength, double clip, int rule, double min_range, bool drop_uniform, bool divide_by_std) {
            return Shaping{strength, clip, static_cast<Rule>(rule), min_range, drop_uniform, divide_by_std};
          }));
  py::class_<Groups>(m, "Groups", local)
      .def(py::init([](Address features, Address rewards, Address cu_groups, Address valid, int64_t G, int64_t d,
                       int64_t m_max) {
        return Groups{at<float>(features), at<double>(rewards), at<int64_t>(cu_groups), at<bool>(valid), G, d, m_max};
      }));
  py::class_<GroupAdvantages>(m, "GroupAdvantages", local)
      .def(py::init([](Address advantages, Address shaped_rewards, Address scores, Address similarity) {
        return GroupAdvantages{at<float>(advantages), at<float>(shaped_rewards), at<float>(scores),
                               at<float>(similarity)};
      }));
  m.def("g2rl_advantages", [](const Groups& groups, const Shaping& shaping, const GroupAdvantages& out, int threads) {
    on_threads_of(threads, [&] { g2rl_advantages(groups, shaping, out); });
  });
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.attr("interface") = G2RL_INTERFACE;  // stands for the files that say how it is called
  bind_head(m);
  bind_groups(m);
  m.def("instruction_set", [] { return std::string(isa_name(isa())); });
  m.def("instruction_sets", [] { return isa_names(highest_isa()); });
}
