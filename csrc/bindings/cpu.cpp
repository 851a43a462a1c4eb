// Python bindings of the CPU kernels; arguments were checked by the public functions.
#include <torch/extension.h>

#include "../cpu/groups.h"
#include "../cpu/head.h"
#include "../cpu/isa.h"

namespace {

using at::Tensor;
using g2rl::Head;
using g2rl::TokenStats;
using OptionalTensor = std::optional<Tensor>;

// Kernels read rows of adjacent elements, however far apart the rows.
Tensor rows(const Tensor& t) { return t.stride(1) == 1 || t.size(1) <= 1 ? t : t.contiguous(); }

OptionalTensor floats(const OptionalTensor& t) {
  return t ? OptionalTensor(t->to(at::kFloat).contiguous()) : std::nullopt;
}

// Records of g2rl_kernels/records.py, read while Python's lock is held.

Head head_of(const py::object& record) {
  const auto number = [&](const char* name) { return record.attr(name).cast<double>(); };
  return {rows(record.attr("weight").cast<Tensor>()), record.attr("bias").cast<OptionalTensor>(), number("temperature"),
          number("logit_scale"), number("softcap")};
}

struct Responses {
  Tensor cu_seqlens;
  OptionalTensor token_weights, lse;
};

Responses responses_of(const py::object& record) {
  return {record.attr("cu_seqlens").cast<Tensor>(), record.attr("token_weights").cast<OptionalTensor>(),
          record.attr("lse").cast<OptionalTensor>()};
}

g2rl::Shaping shaping_of(const py::object& record, const std::string& normalize) {
  const auto rule = record.attr("rule").cast<std::string>();
  const g2rl::Rule which = rule == "scale"      ? g2rl::Rule::scale
                           : rule == "centered" ? g2rl::Rule::centered
                                                : g2rl::Rule::literal;
  return {record.attr("strength").cast<double>(),
          record.attr("clip").cast<double>(),
          which,
          record.attr("min_range").cast<double>(),
          record.attr("uniform_groups").cast<std::string>() == "drop",
          normalize == "std"};
}

auto token_logprobs(const Tensor& hidden, const py::object& head, const Tensor& targets) {
  const Head of_kernels = head_of(head);
  py::gil_scoped_release release;
  const TokenStats s = g2rl::token_logprobs(rows(hidden), of_kernels, targets.contiguous());
  return std::make_tuple(s.logps, s.entropy, s.lse);
}

auto sequence_features(const Tensor& hidden, const py::object& head, const Tensor& targets, const py::object& responses,
                       int64_t workspace_bytes) {
  const Head of_kernels = head_of(head);
  const Responses r = responses_of(responses);
  py::gil_scoped_release release;
  const auto [features, s] =
      g2rl::sequence_features(rows(hidden), of_kernels, targets.contiguous(), r.cu_seqlens.to(at::kLong).contiguous(),
                              floats(r.token_weights), floats(r.lse), workspace_bytes);
  return std::make_tuple(features, s.logps, s.entropy, s.lse);
}

Tensor token_sums(const Tensor& hidden, const py::object& head, const Tensor& targets) {
  const Head of_kernels = head_of(head);
  py::gil_scoped_release release;
  return g2rl::token_sums(rows(hidden), of_kernels, targets.contiguous());
}

auto part_features(const Tensor& hidden, const py::object& head, const Tensor& targets, const py::object& responses,
                   const Tensor& sums, int64_t workspace_bytes) {
  const Head of_kernels = head_of(head);
  const Responses r = responses_of(responses);
  py::gil_scoped_release release;
  const auto [features, s] =
      g2rl::part_features(rows(hidden), of_kernels, targets.contiguous(), r.cu_seqlens.to(at::kLong).contiguous(),
                          floats(r.token_weights), sums.contiguous(), workspace_bytes);
  return std::make_tuple(features, s.logps, s.entropy, s.lse);
}

std::tuple<OptionalTensor, OptionalTensor, OptionalTensor> logprobs_backward(
    const Tensor& grad_logps, const Tensor& grad_entropy, const Tensor& hidden, const py::object& head,
    const Tensor& targets, const std::tuple<Tensor, Tensor, Tensor>& saved, const std::tuple<bool, bool, bool>& needs,
    int64_t workspace_bytes) {
  const Head of_kernels = head_of(head);
  py::gil_scoped_release release;
  const auto f = [](const Tensor& t) { return t.to(at::kFloat).contiguous(); };
  const auto& [logps, entropy, lse] = saved;
  const auto& [need_hidden, need_weight, need_bias] = needs;
  const auto [dh, dw, db] = g2rl::logprobs_backward(f(grad_logps), f(grad_entropy), rows(hidden), of_kernels,
                                                    targets.contiguous(), TokenStats{f(logps), f(entropy), f(lse)},
                                                    workspace_bytes, {need_hidden, need_weight, need_bias});
  const auto optional = [](const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; };
  return {optional(dh), optional(dw), optional(db)};
}

auto g2rl_advantages(const Tensor& features, const Tensor& rewards, const Tensor& cu_groups, int64_t m_max,
                     const OptionalTensor& valid, const py::object& shaping, const std::string& normalize) {
  const g2rl::Shaping how = shaping_of(shaping, normalize);
  py::gil_scoped_release release;
  const auto out = g2rl::g2rl_advantages(features, rewards, cu_groups.to(at::kLong).contiguous(), m_max,
                                         valid ? OptionalTensor(valid->contiguous()) : std::nullopt, how);
  return std::make_tuple(out.advantages, out.shaped_rewards, out.scores, out.similarity);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("token_logprobs", &token_logprobs);
  m.def("sequence_features", &sequence_features);
  m.def("token_sums", &token_sums);
  m.def("part_features", &part_features);
  m.def("logprobs_backward", &logprobs_backward);
  m.def("g2rl_advantages", &g2rl_advantages);
  m.def("instruction_set", [] { return std::string(g2rl::isa_name(g2rl::isa())); });
  m.def("instruction_sets", [] {
    std::vector<std::string> names;
    for (int i = static_cast<int>(g2rl::highest_isa()); i >= 0; --i)
      names.push_back(g2rl::isa_name(static_cast<g2rl::Isa>(i)));
    return names;
  });
}
