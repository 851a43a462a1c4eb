// Python bindings of the CUDA kernels: the structs and functions of csrc/cuda/head.h and groups.h under their own
// names. Pointers and streams are integers, so that torch's headers are not needed. Compiled by nvcc, or by a C++
// compiler with the kernels as they run on a CPU.
#include <pybind11/pybind11.h>

#include "../cuda/groups.h"
#include "../cuda/head.h"

namespace py = pybind11;
using namespace g2rl::cuda;

namespace {

using Address = uintptr_t;

// Kernels of a GPU and those that run on a CPU may be in one process, whose types would count as defined twice.
const py::module_local local;

template <class T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}
Stream stream_of(Address handle) { return reinterpret_cast<Stream>(handle); }

// Raises RuntimeError for an error code other than 0.
void check(int error, const char* kernel) {
  if (error == 0) return;
#ifdef __CUDACC__
  const auto code = cudaError_t(error);
  throw std::runtime_error(std::string(kernel) + ": " + cudaGetErrorName(code) + ", " + cudaGetErrorString(code));
#else
  throw std::runtime_error(std::string(kernel) + ": error " + std::to_string(error));
#endif
}

// Why no kernel can run on any device of this process; empty where one can.
std::string driver_error() {
#ifdef __CUDACC__
  int count = 0, runtime = 0, driver = 0;
  const auto error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess) return "";
  cudaGetLastError();
  cudaRuntimeGetVersion(&runtime);
  cudaDriverGetVersion(&driver);
  if (driver == 0) return "no NVIDIA driver was found";
  const auto version = [](int v) { return std::to_string(v / 1000) + "." + std::to_string(v % 1000 / 10); };
  return std::string(cudaGetErrorName(error)) + ": built with CUDA " + version(runtime) +
         ", and the driver knows CUDA " + version(driver);
#else
  return "";
#endif
}

void bind_structs(py::module_& m) {
  py::enum_<Dtype>(m, "Dtype", local).value("bf16", Dtype::bf16).value("fp16", Dtype::fp16).value("fp32", Dtype::fp32);
  py::class_<Head>(m, "Head", local)
      .def(py::init([](Address weight, Address bias, int64_t stride, int V, int d, Dtype dtype, Dtype bias_dtype,
                       float inner_scale, float scale, bool softcap) {
             return Head{at<void>(weight), at<void>(bias), stride, V,      d, dtype,
                         bias_dtype,       inner_scale,    scale,  softcap};
           }),
           py::arg("weight"), py::arg("bias"), py::arg("stride"), py::arg("V"), py::arg("d"), py::arg("dtype"),
           py::arg("bias_dtype"), py::arg("inner_scale"), py::arg("scale"), py::arg("softcap"));
  py::class_<Tokens>(m, "Tokens", local).def(py::init([](Address hidden, Address targets, int64_t stride, int N) {
    return Tokens{at<void>(hidden), at<int64_t>(targets), stride, N};
  }));
  py::class_<Responses>(m, "Responses", local).def(py::init([](Address cu_seqlens, int B) {
    return Responses{at<int>(cu_seqlens), B};
  }));
  py::class_<Partials>(m, "Partials", local).def(py::init([](Address planes, int splits) {
    return Partials{at<float>(planes), splits};
  }));
  // From rows of one matrix, `stride` numbers apart.
  py::class_<Terms>(m, "Terms", local).def(py::init([](Address rows, int64_t stride) {
    float* first = at<float>(rows);
    return Terms{first, first + stride, first + 2 * stride, first + 3 * stride, first + 4 * stride};
  }));
  py::class_<Kept>(m, "Kept", local).def(py::init([](Address rows, int64_t stride, int roots_of) {
    return Kept{at<void>(rows), stride, roots_of};
  }));
  py::class_<Strip>(m, "Strip", local)
      .def(py::init([](Address G, Address G_even, Address even_scale, int64_t stride, int v_start, int v_end) {
        return Strip{at<void>(G), at<void>(G_even), at<float>(even_scale), stride, v_start, v_end};
      }));
}

// The functions that sm80 and sm90 have alike.
struct Generation {
  decltype(&sm80::splits) splits, residual_splits;
  decltype(&sm80::kept_bytes) kept_bytes;
  decltype(&sm80::kept_roots) kept_roots;
  decltype(&sm80::statistics) statistics;
  decltype(&sm80::residuals) residuals;
  decltype(&sm80::residuals_and_statistics) residuals_and_statistics;
  decltype(&sm80::grad_logits) grad_logits;
  decltype(&sm80::projection_bytes) projection_bytes;
  decltype(&sm80::project) project;
};

#define G2RL_GENERATION(name)                                                                                   \
  Generation {                                                                                                  \
    name::splits, name::residual_splits, name::kept_bytes, name::kept_roots, name::statistics, name::residuals, \
        name::residuals_and_statistics, name::grad_logits, name::projection_bytes, name::project                \
  }

void bind_generation(py::module_ m, const Generation& of) {
  m.def("splits", of.splits);
  m.def("residual_splits", of.residual_splits);
  m.def("kept_bytes", of.kept_bytes);
  m.def("kept_roots", of.kept_roots);
  m.def("statistics",
        [of](const Head& head, const Tokens& tokens, const Partials& partials, const Kept& kept, Address stream) {
          check(of.statistics(head, tokens, partials, kept, stream_of(stream)), "statistics");
        });
  m.def("residuals", [of](const Head& head, const Tokens& tokens, const Responses& responses, const Terms& terms,
                          Address flags, Address packing, Address R, Address stream) {
    check(
        of.residuals(head, tokens, responses, terms, at<int>(flags), at<int>(packing), at<float>(R), stream_of(stream)),
        "residuals");
  });
  m.def("residuals_and_statistics",
        [of](const Head& head, const Tokens& tokens, const Responses& responses, Address lse, Address a,
             Address packing, Address R, const Partials& partials, Address stream) {
          check(of.residuals_and_statistics(head, tokens, responses, at<float>(lse), at<float>(a), at<int>(packing),
                                            at<float>(R), partials, stream_of(stream)),
                "residuals_and_statistics");
        });
  m.def("grad_logits", [of](const Head& head, const Tokens& tokens, Address rows_in, int64_t rows_stride,
                            const Strip& strip, Address stream) {
    check(of.grad_logits(head, tokens, at<float>(rows_in), rows_stride, strip, stream_of(stream)), "grad_logits");
  });
  m.def("projection_bytes", of.projection_bytes);
  m.def("project", [of](const Head& head, Address R, Address inverse, int B, float logit_scale, Address memory,
                        Address features, Address stream) {
    check(of.project(head, at<float>(R), at<float>(inverse), B, logit_scale, at<void>(memory), at<float>(features),
                     stream_of(stream)),
          "project");
  });
}

void bind_tokens(py::module_& m) {
  m.def("merge", [](const Head& head, const Partials& partials, int N, Address lse, Address a, Address results,
                    int64_t stride, const Terms& terms, Address stream) {
    check(merge(head, partials, N, at<float>(lse), at<float>(a), at<float>(results), stride, terms, stream_of(stream)),
          "merge");
  });
  m.def("responses",
        [](const Responses& of, Address a, Address S, Address lse, Address inverse, Address flags, Address stream) {
          check(responses(of, at<float>(a), at<float>(S), at<float>(lse), at<float>(inverse), at<int>(flags),
                          stream_of(stream)),
                "responses");
        });
  m.def("packing_bytes", &packing_bytes);
  m.def("add_kept", [](const Head& head, const Kept& kept, Address targets, const Responses& of, const Terms& terms,
                       Address from, Address to, int first, int last, Address R, Address stream) {
    check(add_kept(head, kept, at<int64_t>(targets), of, terms, {at<float>(from), at<float>(to)}, first, last,
                   at<float>(R), stream_of(stream)),
          "add_kept");
  });
  m.def("add_targets", [](Address targets, int N, const Responses& of, const Terms& terms, Address flags, int V,
                          Address R, Address stream) {
    check(add_targets(at<int64_t>(targets), N, of, terms, at<int>(flags), V, at<float>(R), stream_of(stream)),
          "add_targets");
  });
}

void bind_groups(py::module_& m) {
  py::class_<Groups>(m, "Groups", local)
      .def(py::init([](Address features, Address rewards, Address cu_groups, Address valid, int64_t stride, int G,
                       int d, int m_max) {
        return Groups{
            at<float>(features), at<float>(rewards), at<int>(cu_groups), at<uint8_t>(valid), stride, G, d, m_max};
      }));
  py::class_<Shaping>(m, "Shaping", local)
      .def(py::init([](float strength, float clip, int rule, float min_range, bool drop_uniform, bool by_std) {
        return Shaping{strength, clip, Rule(rule), min_range, drop_uniform, by_std};
      }));
  py::class_<Advantages>(m, "Advantages", local)
      .def(py::init([](Address advantages, Address shaped_rewards, Address scores, Address similarity) {
        return Advantages{at<float>(advantages), at<float>(shaped_rewards), at<float>(scores), at<float>(similarity)};
      }));
  m.def("most_members", &most_members);
  m.def("g2rl_advantages", [](const Groups& groups, const Shaping& shaping, const Advantages& out, Address stream) {
    check(g2rl_advantages(groups, shaping, out, stream_of(stream)), "g2rl_advantages");
  });
}

}  // namespace

PYBIND11_MODULE(G2RL_MODULE, m) {
  m.attr("architectures") = G2RL_ARCHITECTURES;
  m.attr("sources") = G2RL_SOURCES;  // a number for what the module was compiled from, and by
  m.def("driver_error", &driver_error);
  bind_structs(m);
  bind_generation(m.def_submodule("sm80"), G2RL_GENERATION(sm80));
  auto for_sm90 = m.def_submodule("sm90");
  bind_generation(for_sm90, G2RL_GENERATION(sm90));
  for_sm90.def("serves", &sm90::serves);
  bind_tokens(m);
  bind_groups(m);
}
