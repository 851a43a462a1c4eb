"""Nothing reaches for the network: neither an import of any module nor code that was not asked to."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGES = (ROOT / "g2rl_kernels", ROOT / "python" / "g2rl")
NETWORK = frozenset(
    {"aiohttp", "ftplib", "http", "httpx", "huggingface_hub", "requests", "smtplib", "socket", "urllib"}
)
KNOWN = {
    "g2rl/rollout/vllm_server.py": "talks to the server that rollout.server names",
    "g2rl/push.py": "uploads a model when `g2rl push` is called",
    "g2rl/card.py": "the text of a model card",
}
NEEDS_MORE = {"verl": "the plug-in for verl", "vllm": "sampling by vLLM", "trl": "the integration with TRL"}
"""Packages that a module may miss where this is run."""

PROGRAM = """
import importlib, pkgutil, sys
def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.sendto", "socket.bind"):
        address = arguments[-1] if event != "socket.getaddrinfo" else arguments[:2]
        raise SystemExit(f"{event} {address}")
sys.addaudithook(refuse)
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


def test_imports_open_no_connection() -> None:
    code = f"import sys; sys.path[:] = {sys.path!r}\n{PROGRAM}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    missing = {line.split()[1] for line in done.stdout.splitlines()}
    assert missing <= set(NEEDS_MORE)


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
