"""verl's engine for FSDP and FSDP2 that adds the feature of each response to a pass for log-probabilities.

Features are made inside the model's forward pass where the head is about to work: FSDP has its weight whole there, with
verl's fused kernels as without them. Every other pass is verl's own.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from tensordict import TensorDict
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_name, get_vendor
from verl.workers.engine import EngineRegistry, FSDPEngineWithLMHead

from g2rl.integrations.head_pass import FeaturePass, HeadHook, predicted_response
from g2rl_kernels import pad

# Asks for features, beside `calculate_entropy`; and the field that they come back in, [B, d] fp32.
REQUEST, FEATURES = "g2rl_features", "g2rl_phi"
FUSED = (
    "verl's fused kernels leave out a bias, logit scale and soft cap, which this head may have; set "
    "actor_rollout_ref.model.use_fused_kernels=False"
)


# A key with a vendor goes before verl's own without one.
@EngineRegistry.register("language_model", ["fsdp", "fsdp2"], device=get_device_name(), vendor=get_vendor())
class G2RLEngine(FSDPEngineWithLMHead):
    """`FSDPEngineWithLMHead` that returns `FEATURES` where a batch asks for them with `REQUEST`.

    Raises:
        NotImplementedError: temperatures that differ within a batch.
        ValueError: an adapter on the head.
        RuntimeError: verl's log-probabilities are not those of the model's head.
    """

    _hook: HeadHook | None = None

    def prepare_model_inputs(self, micro_batch: TensorDict) -> tuple[dict[str, Any], dict[str, Any]]:
        model_inputs, output_args = super().prepare_model_inputs(micro_batch)
        asked = tu.get_non_tensor_data(data=micro_batch, key=REQUEST, default=False)
        if asked and self._hook is None:
            fused = FUSED if self.model_config.use_fused_kernels else ""
            self._hook = HeadHook(self.module, "verl", "actor_rollout_ref.model.target_modules", fused)
        if self._hook is not None:
            self._hook.awaited = self._feature_pass(micro_batch, model_inputs, output_args) if asked else None
        return model_inputs, output_args

    def prepare_model_outputs(
        self, output: Any, output_args: dict[str, Any], micro_batch: TensorDict, logits_processor_func: Any
    ) -> dict[str, torch.Tensor]:
        outputs = super().prepare_model_outputs(output, output_args, micro_batch, logits_processor_func)
        if self._hook is None or self._hook.awaited is None:
            return outputs
        done, self._hook.awaited = self._hook.awaited, None

        def logps() -> torch.Tensor:
            local = self._local(outputs["log_probs"].detach().values(), output_args, 0.0)
            return local[self._predicted(micro_batch, output_args) >= 0]

        outputs[FEATURES] = self._hook.features(done, logps)
        return outputs

    def _feature_pass(
        self, micro_batch: TensorDict, model_inputs: dict[str, Any], output_args: dict[str, Any]
    ) -> FeaturePass:
        response, targets = self._predicted(micro_batch, output_args), output_args["input_ids_rmpad_rolled"]
        padding_mask, temperature = model_inputs["attention_mask"], uniform_temperature(micro_batch["temperature"])
        if padding_mask is not None:
            response, targets = pad(response, padding_mask, -1), pad(targets, padding_mask)
        return FeaturePass(response, targets, len(micro_batch), temperature, self.ulysses_parallel_group)

    def _predicted(self, micro_batch: TensorDict, output_args: dict[str, Any]) -> torch.Tensor:
        """[n] of this rank's part of the packed sequences: the response whose token a position predicts, or -1."""
        mask = micro_batch["response_mask"]
        response = predicted_response(micro_batch["input_ids"].offsets(), mask.values(), mask.offsets())
        return self._local(response, output_args, -1)

    def _local(self, packed: torch.Tensor, output_args: dict[str, Any], value: float) -> torch.Tensor:
        """This rank's part of values [N] of a packed batch, padded as verl pads it."""
        packed = F.pad(packed, (0, output_args.get("pad_size", 0)), value=value)
        if not self.use_ulysses_sp:
            return packed
        return packed.chunk(self.ulysses_sequence_parallel_size)[self.ulysses_device_mesh["sp"].get_local_rank()]


def uniform_temperature(temperature: float | torch.Tensor) -> float:
    """Of a batch's responses; raises NotImplementedError where they differ."""
    if isinstance(temperature, torch.Tensor):
        values = temperature.unique()
        if values.numel() != 1:
            raise NotImplementedError(f"temperature: expected one for all responses, found {values.tolist()}")
        return float(values)
    return float(temperature)
