// Python bindings of the CPU kernels. The only file here that knows of Python; arguments were checked by the public
// functions.
#include <torch/extension.h>

#include "../cpu/groups.h"
#include "../cpu/head.h"
#include "../cpu/panels.h"

namespace {

using at::Tensor;
using g2rl::Head;
using g2rl::TokenStats;
using OptionalTensor = std::optional<Tensor>;

// Kernels read rows of adjacent elements, however far apart the rows.
Tensor rows(const Tensor& t) { return t.stride(1) == 1 || t.size(1) <= 1 ? t : t.contiguous(); }

Head make_head(const Tensor& weight, const OptionalTensor& bias, double temperature, double logit_scale,
               double softcap) {
  return {rows(weight), bias, temperature, logit_scale, softcap};
}

OptionalTensor floats(const OptionalTensor& t) {
  return t ? OptionalTensor(t->to(at::kFloat).contiguous()) : std::nullopt;
}

auto token_logprobs(const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias, const Tensor& targets,
                    double temperature, double logit_scale, double softcap, int64_t workspace_bytes) {
  py::gil_scoped_release release;
  const TokenStats s = g2rl::token_logprobs(rows(hidden), make_head(weight, bias, temperature, logit_scale, softcap),
                                            targets.contiguous(), workspace_bytes);
  return std::make_tuple(s.logps, s.entropy, s.lse);
}

auto sequence_features(const Tensor& hidden, const Tensor& weight, const OptionalTensor& bias, const Tensor& targets,
                       const Tensor& cu_seqlens, const OptionalTensor& token_weights, const OptionalTensor& lse,
                       double temperature, double logit_scale, double softcap, int64_t workspace_bytes) {
  py::gil_scoped_release release;
  const auto [features, s] = g2rl::sequence_features(
      rows(hidden), make_head(weight, bias, temperature, logit_scale, softcap), targets.contiguous(),
      cu_seqlens.to(at::kLong).contiguous(), floats(token_weights), floats(lse), workspace_bytes);
  return std::make_tuple(features, s.logps, s.entropy, s.lse);
}

std::tuple<OptionalTensor, OptionalTensor, OptionalTensor> logprobs_backward(
    const Tensor& grad_logps, const Tensor& grad_entropy, const Tensor& hidden, const Tensor& weight,
    const OptionalTensor& bias, const Tensor& targets, const Tensor& logps, const Tensor& entropy, const Tensor& lse,
    double temperature, double logit_scale, double softcap, int64_t workspace_bytes, bool need_hidden, bool need_weight,
    bool need_bias) {
  py::gil_scoped_release release;
  const auto f = [](const Tensor& t) { return t.to(at::kFloat).contiguous(); };
  const auto [dh, dw, db] = g2rl::logprobs_backward(f(grad_logps), f(grad_entropy), rows(hidden),
                                                    make_head(weight, bias, temperature, logit_scale, softcap),
                                                    targets.contiguous(), TokenStats{f(logps), f(entropy), f(lse)},
                                                    workspace_bytes, {need_hidden, need_weight, need_bias});
  const auto optional = [](const Tensor& t) { return t.defined() ? OptionalTensor(t) : std::nullopt; };
  return {optional(dh), optional(dw), optional(db)};
}

auto g2rl_advantages(const Tensor& features, const Tensor& rewards, const Tensor& cu_groups, int64_t m_max,
                     const OptionalTensor& valid, double strength, double clip, const std::string& rule,
                     double min_range, const std::string& uniform_groups, const std::string& normalize) {
  py::gil_scoped_release release;
  const g2rl::Rule which = rule == "scale"      ? g2rl::Rule::scale
                           : rule == "centered" ? g2rl::Rule::centered
                                                : g2rl::Rule::literal;
  const auto out =
      g2rl::g2rl_advantages(features, rewards, cu_groups.to(at::kLong).contiguous(), m_max,
                            valid ? OptionalTensor(valid->contiguous()) : std::nullopt,
                            {strength, clip, which, min_range, uniform_groups == "drop", normalize == "std"});
  return std::make_tuple(out.advantages, out.shaped_rewards, out.scores, out.similarity);
}

}  // namespace

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  m.def("token_logprobs", &token_logprobs);
  m.def("sequence_features", &sequence_features);
  m.def("logprobs_backward", &logprobs_backward);
  m.def("g2rl_advantages", &g2rl_advantages);
  m.def("instruction_set", [] { return std::string(g2rl::rowwise().name); });
}
