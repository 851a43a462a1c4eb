"""Lines of the README and of docs/TRAINERS.md for a loop of one's own: they run as they stand there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import LlamaConfig, LlamaForCausalLM

from g2rl_kernels import LMHead, sequence_features, unpad
from tests.g2rl.architectures import SIZES
from tests.integrations.written_out import features, shaped_rewards

ROOT = Path(__file__).parent.parent.parent
B, L, PROMPT = 8, 12, 4
# fp32 features of size 1, by another order of sums.
CLOSE = {"atol": 2e-5, "rtol": 1e-4}


def snippet(page: str, first: str) -> str:
    """The Python lines of a page that begin with `first`."""
    blocks = [part.partition("```")[0] for part in (ROOT / page).read_text().split("```python\n")[1:]]
    return next(block for block in blocks if block.startswith(first))


@pytest.fixture
def loop() -> dict[str, Any]:
    """What a loop has: a model, and a group of 8 responses of several lengths to a prompt, padded behind."""
    torch.manual_seed(0)
    lengths = torch.tensor([8, 3, 5, 8, 1, 7, 2, 6])
    position = torch.arange(L).expand(B, L)
    mask = position < PROMPT + lengths[:, None]
    ids = torch.randint(3, SIZES["vocab_size"], (B, L))
    ids[:, :PROMPT] = ids[0, :PROMPT]
    response_mask = (mask & (position >= PROMPT)).long()
    rewards = torch.tensor([1.0, -1, -1, 1, -1, -1, 1, -1])
    names = {"model": LlamaForCausalLM(LlamaConfig(**SIZES)), "ids": ids, "mask": mask.long(), "torch": torch}
    return names | {"response_mask": response_mask, "rewards": rewards}


@pytest.fixture
def group(tmp_path: Path) -> Iterator[dist.ProcessGroup]:
    """Of one rank."""
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def expected(loop: dict[str, Any]) -> torch.Tensor:
    """Features [B, d] by autograd through logits, of each row without its padding."""
    rows = zip(loop["ids"], loop["response_mask"], loop["mask"], strict=True)
    return features(loop["model"], [(ids[: m.sum()], scored[: m.sum()]) for ids, scored, m in rows], 1.0).float()


def test_padded_rows(loop: dict[str, Any]) -> None:
    exec(snippet("README.md", "from g2rl_kernels import LMHead"), loop)
    torch.testing.assert_close(loop["out"].features, expected(loop), **CLOSE)
    shaped = torch.tensor(shaped_rewards(expected(loop).double(), loop["rewards"].tolist(), [0] * B))
    torch.testing.assert_close(loop["result"].shaped_rewards, shaped, **CLOSE)


def test_packed_rows(loop: dict[str, Any]) -> None:
    wanted = expected(loop)
    kept = loop["mask"].bool()
    loop["position_ids"] = torch.arange(L).expand(B, L)[kept][None]
    loop["response_mask"], cu_seqlens = unpad(loop["response_mask"], kept)
    loop["response_mask"], loop["ids"] = loop["response_mask"][None], loop["ids"][kept][None]
    exec(snippet("README.md", "from g2rl_kernels import LMHead").splitlines()[0], loop)
    loop |= {"head": LMHead(loop["model"].lm_head.weight), "cu_seqlens": cu_seqlens}
    exec(snippet("docs/TRAINERS.md", "scored = response_mask[0]"), loop)
    torch.testing.assert_close(loop["out"].features, wanted, **CLOSE)


def test_groups_in_any_order(loop: dict[str, Any]) -> None:
    """Of rewards from 0 to 1."""
    hidden, cu_seqlens = unpad(torch.randn(B, L, 32), loop["mask"])
    targets = loop["ids"][loop["mask"].bool()]
    loop |= {"out": sequence_features(hidden, loop["model"].lm_head.weight, targets, cu_seqlens)}
    loop |= {"prompt_ids": list("abbaabab"), "rewards": (loop["rewards"] + 1) / 2}
    exec(snippet("docs/TRAINERS.md", "from g2rl.integrations.exploration import Options, shape_by_uid"), loop)
    Phi = loop["out"].features.double()
    shaped = shaped_rewards(Phi, loop["rewards"].tolist(), loop["prompt_ids"], (0, 1))
    torch.testing.assert_close(loop["shaped"], torch.tensor(shaped), **CLOSE)
    assert loop["metrics"]["feature_norm"] == pytest.approx(float(Phi.norm(dim=1).mean()), rel=1e-5)


def test_an_adapter_on_the_head(loop: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    loop["hidden"] = torch.randn(3, 32)
    config = peft.LoraConfig(target_modules=["lm_head"], init_lora_weights=False)
    model = loop["model"] = peft.get_peft_model(loop["model"], config)
    exec("from g2rl_kernels import LMHead\n" + snippet("docs/TRAINERS.md", "layer = model.get_output"), loop)
    logits = loop["hidden"] @ loop["head"].weight.T
    torch.testing.assert_close(logits, model.get_output_embeddings()(loop["hidden"]), **CLOSE)
    loop["head"].weight.sum().backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora" in name)


def test_in_a_wrappers_forward_pass(loop: dict[str, Any], group: dist.ProcessGroup) -> None:
    wanted, whole = expected(loop), loop["model"]
    loop |= {"DistributedDataParallel": DistributedDataParallel, "scored": loop["response_mask"].bool()}
    exec(snippet("docs/TRAINERS.md", "from g2rl.integrations.head_pass import HeadPass, add_head_pass"), loop)
    torch.testing.assert_close(loop["out"].features, wanted, **CLOSE)
    loop["out"].logps.sum().backward()
    assert all(p.grad is not None for p in whole.parameters())


def test_ranks_that_share_a_head(loop: dict[str, Any], group: dist.ProcessGroup) -> None:
    wanted = expected(loop)
    exec(snippet("README.md", "from g2rl_kernels import LMHead"), loop)
    targets = loop["ids"][:, 1:][loop["scored"]]
    loop |= {"tp": group, "weight_part": loop["head"].weight, "bias_part": None, "targets": targets}
    exec(snippet("docs/TRAINERS.md", "head = LMHead(weight_part"), loop)
    torch.testing.assert_close(loop["out"].features, wanted, **CLOSE)


def test_ranks_that_share_responses(loop: dict[str, Any], group: dist.ProcessGroup) -> None:
    wanted = expected(loop)
    exec(snippet("README.md", "from g2rl_kernels import LMHead"), loop)
    hidden = loop["model"].model(loop["ids"], loop["mask"]).last_hidden_state[:, :-1]
    loop |= {"cp": group, "hidden_of_mine": hidden, "total_tokens": loop["response_mask"].sum()}
    exec(snippet("docs/TRAINERS.md", "mine = torch.arange(cp.rank()"), loop)
    torch.testing.assert_close(loop["out"].features, wanted, **CLOSE)
    loop["loss"].backward()
    assert loop["model"].lm_head.weight.grad.norm() > 0
