"""verl's engine for Megatron that adds the feature of each response to a pass for log-probabilities.

Every other pass is verl's own. Features are those of `g2rl.integrations.megatron`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from tensordict import TensorDict
from verl.models.mcore.util import preprocess_bshd_engine, preprocess_thd_engine
from verl.utils import tensordict_utils as tu
from verl.utils.device import get_device_id, get_vendor
from verl.utils.megatron_utils import unwrap_model
from verl.workers.engine import EngineRegistry
from verl.workers.engine.megatron import MegatronEngineWithLMHead

from g2rl.integrations.head_pass import FeaturePass, predicted_response
from g2rl.integrations.megatron import run_alongside
from g2rl.integrations.verl.engine import FEATURES, REQUEST, uniform_temperature


# A key with a vendor goes before verl's own without one. On other devices than CUDA's verl has another engine.
@EngineRegistry.register("language_model", "megatron", device="cuda", vendor=get_vendor())
class G2RLMegatronEngine(MegatronEngineWithLMHead):
    """`MegatronEngineWithLMHead` that returns `FEATURES` where a batch asks for them with `REQUEST`.

    Raises:
        NotImplementedError: temperatures that differ within a batch, an adapter on the head, or a head whose logits are
            not its product.
    """

    def forward_step(self, batch_iter: Iterator[TensorDict], model: Any, *args: Any, **kwargs: Any) -> Any:
        batch, inner = next(batch_iter), unwrap_model(model)
        asked = tu.get_non_tensor_data(data=batch, key=REQUEST, default=False)
        if not asked or not inner.post_process:
            return super().forward_step(iter([batch]), model, *args, **kwargs)
        batch = batch.to(get_device_id())  # where verl would put it, and then finds it
        done = self._feature_pass(batch, inner)
        with run_alongside(inner, done):
            output, postprocess = super().forward_step(iter([batch]), model, *args, **kwargs)
        output[FEATURES] = done.outputs.features  # type: ignore[union-attr]
        return output, postprocess

    def _feature_pass(self, batch: TensorDict, model: Any) -> FeaturePass:
        """As verl lays the batch out: packed or padded, and dealt out over ranks of context parallelism."""
        ids, mask = batch["input_ids"], batch["response_mask"]
        # verl fills up with 0, which is to be none.
        predicted = predicted_response(ids.offsets(), mask.values(), mask.offsets()) + 1
        predicted = torch.nested.nested_tensor_from_jagged(predicted, ids.offsets())
        response = self._local(predicted, batch, model, need_roll=False) - 1
        targets = self._local(ids, batch, model, need_roll=True)
        group = mpu.get_context_parallel_group() if mpu.get_context_parallel_world_size() > 1 else None
        return FeaturePass(response, targets, len(ids), uniform_temperature(batch["temperature"]), group)

    def _local(self, values: torch.Tensor, batch: TensorDict, model: Any, need_roll: bool) -> torch.Tensor:
        """Of ragged values [B, L] those at this rank's positions; with `need_roll` those of the tokens behind them."""
        how = {"need_roll": need_roll, "use_fp8_padding": model.config.fp8 in ("e4m3", "hybrid")}
        if not self.engine_config.use_remove_padding:
            longest = tu.get_non_tensor_data(batch, key="forced_max_seqlen", default=None)
            return preprocess_bshd_engine(values, forced_max_seqlen=longest, **how)[0]
        bucket = self.engine_config.pad_to_length_bucket if self.engine_config.pad_to_length else None
        layout = self._get_context_parallel_layout(model)
        return preprocess_thd_engine(values, pad_to_length_bucket=bucket, cp_layout=layout, **how)[0]
