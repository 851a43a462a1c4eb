"""Who may import whom: read from the source of both packages, and from what a fresh interpreter loads."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import g2rl_kernels

ROOT = Path(__file__).parents[1]
SOURCES = {"g2rl_kernels": ROOT / "g2rl_kernels", "g2rl": ROOT / "python" / "g2rl"}

# Each module or subpackage may import what stands in a lower layer, and its own subpackage. Planned ones may be absent.
LAYERS = {
    "g2rl_kernels": (
        ("version", "checks", "interpreter"),
        ("group_layout", "products", "records", "workspace"),
        ("sums",),
        ("self_check", "plans", "distributed"),
        ("backends",),
        ("dispatch",),
        ("ops",),
        ("__init__", "testing"),
        ("self_check_run",),
        ("__main__",),
    ),
    "g2rl": (
        ("files", "background", "bootstrap", "probes"),
        ("__init__", "types", "config", "heads", "time_limit", "metrics", "progress"),
        ("async_calls",),
        ("plugins", "hub", "devices"),
        ("trackers", "times", "shared_prompts", "adapters", "optimizer"),
        ("parallel",),
        ("log", "manifest"),
        ("tasks", "checkpoint", "model", "encoder", "forward"),
        ("rewards", "reward_range", "rollout", "objective", "geometry", "policy", "forecast", "precision", "backend"),
        ("methods",),
        ("history", "evaluate", "collect", "micro_batches"),
        ("run",),
        ("plots",),
        ("report",),
        ("update", "ahead", "evaluation", "comparison", "card"),
        ("trainer", "integrations", "push", "study", "analysis"),
        ("dry_run",),
        ("cli",),
        ("__main__",),
    ),
}

# What is loaded when first needed, and never by importing a package.
HEAVY = ("triton", "transformers", "g2rl", "accelerate", "datasets", "vllm")


class Import(NamedTuple):
    """One imported module, as written in the source.

    Attributes:
        file: relative to the repository.
        line: of the statement.
        importer, imported: dotted names of modules; `imported` may end in a name of the module.
    """

    file: str
    line: int
    importer: str
    imported: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.importer} imports {self.imported}"


def modules(package: str) -> Iterator[tuple[str, Path]]:
    for path in sorted(SOURCES[package].rglob("*.py")):
        parts = path.relative_to(SOURCES[package].parent).with_suffix("").parts
        yield ".".join(parts), path


def imports(package: str) -> Iterator[Import]:
    """All imports of a package's modules: at the top, inside functions, and for type checkers alone."""
    for name, path in modules(package):
        for node in ast.walk(ast.parse(path.read_text())):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                base = node.module or ""
                if node.level:
                    above = name.split(".")[: -node.level]
                    base = ".".join([*above, base] if base else above)
                names = [f"{base}.{alias.name}" for alias in node.names]
            for imported in names:
                yield Import(str(path.relative_to(ROOT)), node.lineno, name, imported)


def unit(name: str) -> str:
    """The layer's entry that a dotted module name belongs to."""
    parts = name.split(".")
    if len(parts) == 1:
        return "__init__"
    # package.x may also be a name that the package itself defines.
    path = SOURCES[parts[0]] / parts[1]
    return parts[1] if path.is_dir() or path.with_suffix(".py").exists() else "__init__"


def layer(package: str, name: str) -> int:
    for height, members in enumerate(LAYERS[package]):
        if unit(name) in members:
            return height
    raise AssertionError(f"{name}: give it a layer in {Path(__file__).name}")


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def upwards(package: str) -> list[Import]:
    """Imports of a module in the importer's layer or above it."""
    return [
        x
        for x in imports(package)
        if within(x.imported, package)
        and unit(x.importer) != unit(x.imported)
        and layer(package, x.importer) <= layer(package, x.imported)
    ]


@pytest.mark.parametrize("package", SOURCES)
def test_imports_point_downwards(package: str) -> None:
    assert not upwards(package), "\n".join(map(str, upwards(package)))


@pytest.mark.parametrize("package", SOURCES)
def test_every_module_has_one_layer(package: str) -> None:
    entries = [entry for members in LAYERS[package] for entry in members]
    assert len(entries) == len(set(entries))
    for name, _ in modules(package):
        layer(package, name)


def test_ops_reach_backends_through_dispatch() -> None:
    """Dispatch finds them by name; only the tests' oracle is imported."""
    wrong = [
        x
        for x in imports("g2rl_kernels")
        if within(x.imported, "g2rl_kernels.backends") and unit(x.importer) not in ("backends", "testing")
    ]
    assert not wrong, "\n".join(map(str, wrong))


def test_backends_do_not_import_each_other() -> None:
    prefix = "g2rl_kernels.backends."
    wrong = [
        x
        for x in imports("g2rl_kernels")
        if x.importer.startswith(prefix)
        and x.imported.startswith(prefix)
        and x.importer.split(".")[2] != x.imported.split(".")[2]
    ]
    assert not wrong, "\n".join(map(str, wrong))


def test_kernels_import_torch_and_the_standard_library() -> None:
    """Other libraries belong to a backend that says when it cannot have them."""
    allowed = {*sys.stdlib_module_names, "torch", "g2rl_kernels"}
    wrong = [
        x
        for x in imports("g2rl_kernels")
        if x.imported.split(".")[0] not in allowed
        and not (x.imported.split(".")[0] == "triton" and within(x.importer, "g2rl_kernels.backends.triton"))
    ]
    assert not wrong, "\n".join(map(str, wrong))


def test_training_uses_public_names_of_the_kernels() -> None:
    wrong = [
        x
        for x in imports("g2rl")
        if within(x.imported, "g2rl_kernels")
        and x.imported not in ("g2rl_kernels", *(f"g2rl_kernels.{name}" for name in g2rl_kernels.__all__))
    ]
    assert not wrong, "\n".join(map(str, wrong))
    for _, path in modules("g2rl"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "g2rl_kernels":
                assert node.attr in g2rl_kernels.__all__, f"{path.relative_to(ROOT)}:{node.lineno}: {node.attr}"


def test_compiled_sources_include_no_torch_header() -> None:
    """So that one build serves every PyTorch, and a build needs none."""
    sources = [path for path in sorted((ROOT / "csrc").rglob("*")) if path.suffix in (".cpp", ".cu", ".h")]
    assert sources
    for path in sources:
        for number, line in enumerate(path.read_text().splitlines(), 1):
            torch_header = line.startswith("#include") and any(x in line for x in ("torch/", "ATen/", "c10/"))
            assert not torch_header, f"{path.relative_to(ROOT)}:{number}: {line}"


def test_importing_the_kernels_loads_torch_alone() -> None:
    """In a fresh interpreter that refuses the heavy libraries, installed or not, and reports who asked."""
    program = f"""
import importlib.abc, sys, traceback
import torch

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {HEAVY!r}:
            frames = [f.filename for f in traceback.extract_stack() if "importlib" not in f.filename]
            print("asked for", name, "by", frames[-2])
            raise ImportError(name)

sys.meta_path.insert(0, Refuse())
import g2rl_kernels
print(sorted(g2rl_kernels.__all__) != [], [name for name in {HEAVY!r} if name in sys.modules])
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.splitlines() == ["True []"], run.stdout


def test_first_calls_load_no_compiler() -> None:
    """PyTorch's takes seconds to import, forward and backward passes milliseconds."""
    program = """
import sys, torch, g2rl_kernels as k
hidden, targets = torch.randn(6, 8, requires_grad=True), torch.arange(6)
out = k.sequence_features(hidden, k.LMHead(torch.randn(9, 8)), targets, torch.tensor([0, 2, 6]))
advantages = k.g2rl_advantages(out.features, torch.tensor([1.0, -1.0]), 2).advantages
(advantages.repeat_interleave(torch.tensor([2, 4])) * out.logps).sum().backward()
print(hidden.grad.isfinite().all().item(), "torch._dynamo" in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.split() == ["True", "False"]


@pytest.mark.parametrize(
    ("missing", "program", "said"),
    [
        (
            "omegaconf",
            "runpy.run_module('g2rl', run_name='__main__')",
            "g2rl: expected what the trainer needs, found no ",
        ),
        (
            "fcntl",
            "runpy.run_module('g2rl', run_name='__main__')",
            "g2rl: expected Linux, macOS, or WSL under Windows for the trainer, found no fcntl",
        ),
        ("trl", "import g2rl.integrations.trl", "g2rl.integrations.trl: expected trl, found "),
    ],
)
def test_where_the_ops_alone_are_installed(missing: str, program: str, said: str) -> None:
    """Without its extra, what needs one names it; accelerate and transformers are missing too. Windows has no fcntl."""
    absent = dict.fromkeys((missing, "accelerate", "transformers"))
    program = f"import runpy, sys; sys.modules.update({absent!r}); sys.argv[1:] = ['train']; {program}"
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert run.returncode == 1
    assert said in run.stderr.splitlines()[-1]


def test_integrations_for_trainers_without_omegaconf() -> None:
    """Which TRL, axolotl, ms-swift and OpenRLHF bring as little as a plain install of this package."""
    names = ("exploration", "head_pass", "megatron", "openrlhf.options", "trl")
    program = "import sys; sys.modules['omegaconf'] = None; "
    program += "; ".join(f"import g2rl.integrations.{name}" for name in names)
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)


def test_a_torch_without_distributed() -> None:
    """As built with USE_DISTRIBUTED=0: it imports, and a group is refused in words."""
    program = """
import importlib.abc, sys

class Without(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        built = sys.modules["torch._C"] if name == "torch.distributed" else object()
        for part in ("_c10d_init", "_rpc_init", "_dist_autograd_init", "_faulty_agent_init", "_distributed_c10d"):
            if hasattr(built, part):
                delattr(built, part)
        sys.modules.pop("torch._C._distributed_c10d", None)
        if name.startswith("torch._C._distributed_c10d"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Without())
import torch
from g2rl_kernels import LMHead
assert not torch.distributed.is_available()
try:
    LMHead(torch.zeros(1, 3), process_group=object())
except TypeError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    refusal = "head.process_group: expected a torch.distributed.ProcessGroup, found object"
    assert (run.stdout.splitlines(), run.returncode) == ([refusal], 0), run.stderr[-2000:]


def test_the_checks_themselves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule that nothing can break does not exist: each way of writing an import is seen."""
    (tmp_path / "g2rl" / "tasks").mkdir(parents=True)
    (tmp_path / "g2rl" / "trainer.py").write_text("")
    (tmp_path / "g2rl" / "types.py").write_text(
        "import g2rl.trainer\nfrom g2rl import trainer\nfrom .trainer import run\n"
        "def f():\n    from g2rl.trainer import run\n"
    )
    (tmp_path / "g2rl" / "tasks" / "base.py").write_text("from ..trainer import run\nfrom g2rl.types import Problem\n")
    monkeypatch.setitem(SOURCES, "g2rl", tmp_path / "g2rl")
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    found = [(x.importer, x.line, x.imported) for x in imports("g2rl")]
    assert found == [
        ("g2rl.tasks.base", 1, "g2rl.trainer.run"),
        ("g2rl.tasks.base", 2, "g2rl.types.Problem"),
        ("g2rl.types", 1, "g2rl.trainer"),
        ("g2rl.types", 2, "g2rl.trainer"),
        ("g2rl.types", 3, "g2rl.trainer.run"),
        ("g2rl.types", 5, "g2rl.trainer.run"),
    ]
    assert [(x.importer, x.line) for x in upwards("g2rl")] == [
        ("g2rl.tasks.base", 1),
        ("g2rl.types", 1),
        ("g2rl.types", 2),
        ("g2rl.types", 3),
        ("g2rl.types", 5),
    ]
    (tmp_path / "g2rl" / "nowhere.py").write_text("")
    with pytest.raises(AssertionError, match=r"g2rl\.nowhere: give it a layer in test_imports\.py"):
        test_every_module_has_one_layer("g2rl")


def test_messages_name_the_packages_that_extras_ask_for() -> None:
    """This package itself is on no index: `pip install` of its extras would find nothing."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = {requirement for requirements in extras.values() for requirement in requirements}
    named: set[str] = set()
    for file in SOURCES["g2rl"].rglob("*.py"):
        text = file.read_text()
        assert "g2rl-kernels[" not in text, file
        named.update(re.findall(r"""['"]([a-z][a-z0-9-]*(?:\[[a-z-]+\])?>=[^'"]+)['"]""", text))
    assert len(named) >= 8 and named <= asked
