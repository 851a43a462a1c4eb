"""Nothing reaches for the network: neither an import of any module nor code that was not asked to."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from g2rl.rollout.vllm_engine import import_vllm
from tests.g2rl.conftest import build_model

ROOT = Path(__file__).parents[1]
PACKAGES = (ROOT / "g2rl_kernels", ROOT / "python" / "g2rl")
NETWORK = frozenset(
    {"aiohttp", "ftplib", "http", "httpx", "huggingface_hub", "requests", "smtplib", "socket", "urllib"}
)
KNOWN = {
    "g2rl/rollout/vllm_server.py": "talks to the server that rollout.server names",
    "g2rl/hub.py": "looks whether a model or data set that a configuration names can be fetched",
    "g2rl/push.py": "uploads a model when `g2rl push` is called",
    "g2rl/card.py": "the text of a model card",
}
NEEDS_MORE = {
    "axolotl": "the plug-in for axolotl",
    "megatron": "the plug-in for verl",
    "openrlhf": "the integration with OpenRLHF",
    "ray": "the integrations with SkyRL and OpenRLHF",
    "skyrl": "the integration with SkyRL",
    "areal": "the integration with AReaL",
    "tensordict": "the plug-in for verl",
    "transfer_queue": "the plug-in for verl",
    "trl": "the integration with TRL",
    "verl": "the plug-in for verl",
    "vllm": "sampling by vLLM",
}
"""Packages that a module may miss where this is run."""

GUARD = """
import os, sys
def refuse(event, arguments):
    looked_up = event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr", "socket.getnameinfo")
    called = event in ("socket.connect", "socket.bind", "socket.sendto", "socket.sendmsg")
    # Sockets between processes have the names of files; urllib3 binds one to ::1 to learn whether there is IPv6.
    own = called and (not isinstance(arguments[1], tuple) or (event == "socket.bind" and arguments[1][0] == "::1"))
    if looked_up or (called and not own):
        with open(os.environ["G2RL_TESTS_NETWORK"], "a") as file:
            file.write(f"{event} {arguments[:2]}\\n")
        os._exit(3)  # which no `except` and no thread outlives
sys.addaudithook(refuse)
"""
"""Each Python process that finds this as its `sitecustomize` ends at the first use of the network, which it notes."""

IMPORTS = """
import importlib, pkgutil
for name in ("g2rl_kernels", "g2rl"):
    package = importlib.import_module(name)
    for module in pkgutil.walk_packages(package.__path__, f"{name}.", onerror=lambda name: None):
        if module.name.endswith("__main__"):
            continue
        try:
            importlib.import_module(module.name)
        except ImportError as error:
            print(module.name, (error.name or str(error)).partition(".")[0])
"""

TRAINING = """
import sys
from g2rl.cli import main
status = main(["train", *sys.argv[1:]])
from huggingface_hub import constants
print("telemetry off:", constants.HF_HUB_DISABLE_TELEMETRY)
sys.exit(status)
"""
SMALL = (
    "steps=1",
    "task.held_out=2",
    "rollout.prompts=1",
    "rollout.group_size=2",
    "rollout.max_new_tokens=4",
    "eval.samples=1",
    "eval.ks=[1]",
    "model.device=cpu",
)
"""A run from its first evaluation to its report, with judges in processes of their own."""

REPORTS = {
    "in the open": "import socket\nsocket.create_connection(('127.0.0.1', 9))",
    "caught": "import socket\ntry:\n  socket.socket().connect(('127.0.0.1', 9))\nexcept BaseException: pass",
    "a thread": "import socket, threading\n"
    "thread = threading.Thread(target=socket.getaddrinfo, args=('localhost', 9))\nthread.start()\nthread.join()",
    "a process": "import subprocess, sys\n"
    "subprocess.run([sys.executable, '-c', \"import socket; socket.socket(2, 2).sendto(b'', ('127.0.0.1', 9))\"])",
}
"""Ways to the network that a guard could miss."""


def run(folder: Path, code: str, *arguments: str, **variables: str) -> tuple[subprocess.CompletedProcess[str], str]:
    """A program in an interpreter that may not use the network; what it did, and what it used nevertheless."""
    (folder / "sitecustomize.py").write_text(GUARD)
    noted = folder / "network.txt"
    path = os.pathsep.join([str(folder), *(entry for entry in sys.path if entry)])
    kept = {name: value for name, value in os.environ.items() if not name.startswith("HF_HUB_")}
    environment = kept | {"PYTHONPATH": path, "G2RL_TESTS_NETWORK": str(noted)} | variables
    command = [sys.executable, "-c", code, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, env=environment)
    return done, noted.read_text() if noted.is_file() else ""


@pytest.mark.parametrize("code", REPORTS.values(), ids=REPORTS.keys())
def test_the_guard_itself(code: str, tmp_path: Path) -> None:
    assert "('127.0.0.1'," in (used := run(tmp_path, code)[1]) or "('localhost'," in used


def test_imports_open_no_connection(tmp_path: Path) -> None:
    done, used = run(tmp_path, IMPORTS)
    assert (used, done.returncode) == ("", 0), done.stderr[-2000:]
    missing = {line.split()[1] for line in done.stdout.splitlines()}
    assert missing <= set(NEEDS_MORE)


def test_training_opens_no_connection(tmp_path: Path) -> None:
    """From the command to the report, with a model in a folder; and what it loads is told to report nothing."""
    model = build_model(tmp_path / "model")
    (tmp_path / "run.yaml").write_text("name: offline")
    settings = (str(tmp_path / "run.yaml"), f"model.path={model}", f"runs_dir={tmp_path}", *SMALL)
    done, used = run(tmp_path, TRAINING, *settings)
    assert (used, done.returncode) == ("", 0), done.stderr[-2000:]
    assert done.stdout.endswith("telemetry off: True\n")


@pytest.mark.parametrize(
    ("offline", "status", "event"), [("1", 2, ""), ("0", 3, "socket.getaddrinfo ('huggingface.co'")]
)
def test_models_of_the_hub_are_fetched_unless_forbidden(tmp_path: Path, offline: str, status: int, event: str) -> None:
    (tmp_path / "run.yaml").write_text("model: {path: g2rl-tests/none}")
    settings = (str(tmp_path / "run.yaml"), f"runs_dir={tmp_path}")
    done, used = run(tmp_path, TRAINING, *settings, HF_HUB_OFFLINE=offline, HF_HOME=str(tmp_path))
    assert done.returncode == status, done.stderr[-2000:]
    assert used.startswith(event) and bool(used) == bool(event)


@pytest.mark.parametrize(("before", "after"), [(None, "1"), ("0", "0")])
def test_vllm_is_told_to_report_nothing(monkeypatch: pytest.MonkeyPatch, before: str | None, after: str) -> None:
    """Unless somebody wants it."""
    vllm: Any = ModuleType("vllm")
    vllm.__version__, vllm.LLM = "0.32.0", object
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setattr(os, "environ", {} if before is None else {"VLLM_NO_USAGE_STATS": before})
    assert import_vllm() is vllm
    assert os.environ["VLLM_NO_USAGE_STATS"] == after


def test_modules_that_use_the_network_are_known() -> None:
    found = set()
    for package in PACKAGES:
        for path in package.rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
                if NETWORK & {name.partition(".")[0] for name in names}:
                    found.add(str(path.relative_to(package.parent)))
    assert found == set(KNOWN)
