"""The self-check of GPU backends, on a device and backends that fail in each way."""

from __future__ import annotations

import json
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from g2rl_kernels import (
    LMHead,
    dispatch,
    explain,
    self_check,
    self_check_run,
    sequence_features,
    testing,
    use_backend,
)
from g2rl_kernels.__main__ import check
from g2rl_kernels.records import Head
from g2rl_kernels.self_check import Subject, Verdict
from tests import self_checked_backend

CPU = torch.device("cpu")
SUBJECT = Subject("defective", "float32", "head")
ROW = dispatch.Backend("defective", "tests.self_checked_backend", checked=True)
PROGRAM = Path(__file__).with_name("self_checked_backend.py")


@pytest.fixture(autouse=True)
def nothing_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """An empty cache, and a table in which the defective backend comes first."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv(self_check.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(dispatch, "BACKENDS", (ROW, *dispatch.BACKENDS))
    dispatch._load.cache_clear()
    self_check._verdicts.clear()
    yield
    self_check._verdicts.clear()


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Subject]:
    """Checks that were run, each of them passed at once."""
    run: list[Subject] = []

    def at_once(subject: Subject, device: torch.device) -> Verdict:
        run.append(subject)
        found = Verdict(True, when="2026-01-02 03:04")
        self_check._write(self_check._file(subject, device), subject, device, found)
        return found

    monkeypatch.setattr(self_check, "run", at_once)
    return run


def checked(defect: str, work: str = "head", limit_s: float = 120.0) -> Verdict:
    return self_check._run([sys.executable, str(PROGRAM), defect, work], limit_s)


def backend_of(op: str = "sequence_features", head: Head | None = None) -> str:
    module = dispatch.resolve(op, CPU, torch.float32, head).__module__
    return "defective" if module == "tests.self_checked_backend" else module


@pytest.mark.slow
@pytest.mark.parametrize(
    ("defect", "check", "detail", "lasting"),
    [
        ("none", "", "", True),
        ("wrong", "bounds", "in a workspace of 60 rows of logits: Phi, relative: response 0 of 1 tokens is off", True),
        ("nan", "bounds", "as it comes: Phi, relative: response", True),
        ("other bits", "the same bits in each launch", "features has other bits in", True),
        ("batch", "independence of the batch", "features has other bits in", True),
        ("leak", "a NaN in one response", "features has other bits in", True),
        ("crash", "bounds", "ended by SIGSEGV", False),
        ("exits", "bounds", "ended with status 1: no kernel image is available", False),
    ],
)
def test_each_defect_is_found(defect: str, check: str, detail: str, lasting: bool) -> None:
    found = checked(defect)
    assert (found.passed, found.check, found.lasting) == (not check, check, lasting), found
    assert detail in found.detail and 0 < found.seconds < 120


@pytest.mark.slow
@pytest.mark.parametrize(("defect", "passed"), [("none", True), ("wrong", False), ("nan", False)])
def test_groups_are_checked_by_themselves(defect: str, passed: bool) -> None:
    assert checked(defect, "groups").passed == passed


@pytest.mark.parametrize(
    ("error", "lasting"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), False),
        (torch.AcceleratorError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA"), False),
        (torch.AcceleratorError("CUDA error: CUDA-capable device(s) is/are busy or unavailable\nCompile with"), False),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), False),
        (torch.AcceleratorError("CUDA error: an illegal memory access was encountered\nCompile with"), True),
        (AssertionError("off by 1 > 1e-05"), True),
    ],
    ids=str,
)
def test_a_full_or_taken_device_is_not_held_against_kernels(error: Exception, lasting: bool) -> None:
    """The process ends with the error's first line, and its status leaves no result."""

    def check(setting: self_check_run.Setting) -> None:
        raise error

    setting, first = self_check_run.Setting(CPU, torch.float32, False, False), str(error).splitlines()[0]
    if lasting:
        found = self_check_run.run("torch", setting, {"x": check})
        assert found == {"passed": False, "check": "x", "detail": first}
    else:
        with pytest.raises(SystemExit) as ended:
            self_check_run.run("torch", setting, {"x": check})
        assert ended.value.code == first


def test_assertions_are_not_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONOPTIMIZE", "2")
    program = """print('{"check": "", "detail": "", "passed":', str(__debug__).lower(), "}")"""
    assert self_check._run([sys.executable, "-c", program], 60.0).passed


@pytest.mark.slow
def test_a_program_without_assertions_checks_nothing() -> None:
    found = self_check._run([sys.executable, "-O", str(PROGRAM), "nan", "groups"], 120.0)
    assert not found.passed and not found.lasting and "python -O and PYTHONOPTIMIZE leave out" in found.detail


def test_the_next_backend_serves_where_no_process_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", None)
    with pytest.warns(RuntimeWarning, match="failed at its start: cannot start '': "):
        assert backend_of() != "defective"
    assert not self_check._file(SUBJECT, CPU).exists()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_child_forked_during_a_check_does_not_wait_for_it() -> None:
    with self_check._lock:
        child = os.fork()
        if child == 0:
            os._exit(0 if self_check._lock.acquire(timeout=10) else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_time_is_limited() -> None:
    found = self_check._run([sys.executable, "-c", "import time; print('check: x', flush=True); time.sleep(60)"], 1.0)
    assert not found.passed and (found.check, found.detail) == ("x", "took longer than 1 s") and not found.lasting
    assert found.seconds < 10


def test_what_lies_in_the_users_folder_is_not_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "queue.py").write_text("raise SystemExit('imported')")
    command = self_check.command(SUBJECT, CPU)
    program = """import queue; print('{"check": "", "detail": "", "passed": true}')"""
    found = self_check._run([*command[: command.index("-m")], "-c", program], 60.0)
    assert found.passed, found


def test_messages_in_any_encoding() -> None:
    program = r"import os; os.write(2, b'ptxas: /home/Andr\xe9/x.ptx'); os.write(1, b'\xff\n'); raise SystemExit(1)"
    found = self_check._run([sys.executable, "-c", program], 60.0)
    assert found.detail == "ended with status 1: ptxas: /home/Andr\N{REPLACEMENT CHARACTER}/x.ptx"


def test_a_user_without_a_home_is_checked_once_a_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", home)
    result = """print('{"check": "", "detail": "", "passed": true}')"""
    monkeypatch.setattr(self_check, "command", lambda subject, device: [sys.executable, "-c", result])
    assert backend_of() == backend_of() == "defective"
    monkeypatch.setattr(self_check, "command", lambda subject, device: pytest.fail("checked again"))
    assert backend_of() == "defective"
    self_check._verdicts.clear()
    assert self_check.known(SUBJECT, CPU) is None


def test_a_check_ends_though_nobody_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who started it may have been killed."""
    alarms: list[int] = []
    monkeypatch.setattr(self_check_run.signal, "alarm", alarms.append)
    monkeypatch.setattr(self_check_run, "run", lambda *_: {"passed": True})
    assert self_check_run.main(["torch", "cpu", "float32", "groups"]) == 0
    assert alarms == [65] and alarms[0] > self_check.LIMIT_S


def test_a_backend_that_passes_serves_and_is_not_checked_again(runs: list[Subject]) -> None:
    assert backend_of() == backend_of() == "defective" and runs == [SUBJECT]
    self_check._verdicts.clear()
    assert backend_of() == "defective" and runs == [SUBJECT], "another process reads the result"
    weight = torch.zeros(3, 2)
    assert backend_of(head=Head(weight, torch.zeros(3), softcap=5.0)) == "defective"
    assert backend_of("g2rl_advantages") == "defective"
    assert runs[1:] == [replace(SUBJECT, work="head+bias+softcap"), replace(SUBJECT, work="groups")]


def test_a_result_holds_for_these_files_and_versions(runs: list[Subject], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_files_of_package", "_driver"):
        self_check._verdicts.clear()
        assert backend_of() == "defective"
        monkeypatch.setattr(self_check, name, lambda: "another")
    self_check._verdicts.clear()
    assert backend_of() == "defective" and len(runs) == 2
    text = json.loads(self_check._file(SUBJECT, CPU).read_text())
    assert text["facts"]["package"].endswith("another") and text["facts"]["torch"] == torch.__version__
    self_check._file(SUBJECT, CPU).write_text("{")
    self_check._verdicts.clear()
    assert backend_of() == "defective" and len(runs) == 3, "half a file is no result"


def test_a_backend_that_fails_is_replaced_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """The next one serves; random state, grad mode and autocast are as before."""
    failed = "print('check: bounds', flush=True); import os; os.abort()"
    monkeypatch.setattr(self_check, "command", lambda subject, device: [sys.executable, "-c", failed])
    s = testing.head_sample(testing.SMALL)
    before = torch.get_rng_state()
    with pytest.warns(
        RuntimeWarning, match="defective backend does not serve float32 .*bounds: ended by SIGABRT.*--check"
    ):
        sequence_features(s.hidden, s.head, s.targets, s.cu_seqlens)
    with warnings.catch_warnings(), torch.no_grad(), torch.autocast("cpu"):
        warnings.simplefilter("error")
        assert backend_of() != "defective"
        assert not torch.is_grad_enabled() and torch.is_autocast_enabled("cpu")
    assert torch.equal(torch.get_rng_state(), before) and torch.is_grad_enabled()
    assert not self_check._file(SUBJECT, CPU).exists(), "a crash may not happen again"
    with use_backend("defective"):
        assert backend_of() == "defective", "asked for by name it serves"


def test_wrong_numbers_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    result = json.dumps({"passed": False, "check": "bounds", "detail": "off by 1 > 1e-05"})
    monkeypatch.setattr(self_check, "command", lambda subject, device: [sys.executable, "-c", f"print('{result}')"])
    with pytest.warns(RuntimeWarning, match="off by 1 > 1e-05"):
        assert backend_of() != "defective"
    self_check._verdicts.clear()
    monkeypatch.setattr(self_check, "command", lambda subject, device: pytest.fail("checked again"))
    with pytest.warns(RuntimeWarning, match="off by 1 > 1e-05"):
        assert backend_of() != "defective"
    assert "not defective: self-checked on " in explain() and "  defective  serves g2rl_advantages\n" in explain()


def test_variable_skips_or_forces(runs: list[Subject], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(self_check.ENVIRONMENT_VARIABLE, "skip")
    assert backend_of() == "defective" and runs == []
    assert "self-checks of GPU backends: skip" in explain() and "head: not checked" in explain()
    run_of = ("defective", "cpu", self_check.revision("defective"))
    monkeypatch.setitem(self_check.MEASURED, run_of, "benchmarks/results/x.json")
    monkeypatch.delenv(self_check.ENVIRONMENT_VARIABLE)
    assert backend_of() == "defective" and runs == [], "a measured run stands"
    assert "head: benchmarks/results/x.json" in explain()
    monkeypatch.setenv(self_check.ENVIRONMENT_VARIABLE, "force")
    assert backend_of() == backend_of() == "defective" and runs == [SUBJECT], "once a process"
    monkeypatch.setenv(self_check.ENVIRONMENT_VARIABLE, "never")
    with pytest.raises(ValueError, match="G2RL_KERNELS_CHECK: expected skip, force or nothing, found 'never'"):
        backend_of()
    with pytest.raises(ValueError, match="found 'never'"):
        explain()


def test_a_measured_run_stands_for_what_it_ran(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Not for kernels or plans that were changed since."""

    def revision(backend: str) -> str:
        self_check.revision.cache_clear()
        return self_check.revision(backend)

    monkeypatch.setattr(self_check, "_PACKAGE", tmp_path)
    compiled = SimpleNamespace(sources="1")
    monkeypatch.setitem(sys.modules, "g2rl_kernels._cuda", compiled)
    modules = ("checks", "products", "records", "sums", "workspace")
    names = ("backends/triton/merge.py", "plans/head.py", *(f"{name}.py" for name in modules))
    files = [tmp_path / name for name in names]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("1")
    first = revision("triton"), revision("cuda")
    monkeypatch.setitem(self_check.MEASURED, ("cuda", "cpu", first[1]), "benchmarks/results/x.json")
    of_cuda = replace(SUBJECT, backend="cuda")
    assert self_check.measured(of_cuda, CPU) == "benchmarks/results/x.json"
    files[0].write_text("2")
    assert revision("triton") != first[0] and revision("cuda") == first[1]
    compiled.sources = "2"
    assert revision("cuda") != first[1] and self_check.measured(of_cuda, CPU) is None
    compiled.sources = "1"
    assert revision("cuda") == first[1]
    for file in files[1:]:
        file.write_text("2")
        assert revision("cuda") != first[1]
        file.write_text("1")
    monkeypatch.setattr(self_check, "_version", lambda package: "another")
    files[0].write_text("1")
    assert revision("cuda") == first[1] and revision("triton") != first[0], "another compiler"
    self_check.revision.cache_clear()


def test_nothing_is_run_under_capture(runs: list[Subject], monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(self_check, "chip", lambda device: "a GPU")
    monkeypatch.setattr(self_check, "_driver", lambda: "1")
    capturing = True
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    assert self_check.refusal(SUBJECT, gpu) == "not checked yet, and a CUDA graph is being captured" and runs == []
    capturing = False
    assert self_check.refusal(SUBJECT, gpu) is None and runs == [SUBJECT]
    capturing = True
    assert self_check.refusal(SUBJECT, gpu) is None


def test_ranks_agree() -> None:
    """On what the first of them finds, whatever the others would have found; also where it is interrupted."""
    store, found = torch.distributed.HashStore(), {}

    def rank(number: int) -> None:
        found[number] = self_check.agree(store, "key", lambda: Verdict(number == 0, f"of rank {number}"))

    rank(1)
    threads = [threading.Thread(target=rank, args=(number,)) for number in (0, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert asdict(found[0]) == asdict(found[1]) == asdict(found[2]) and found[0].check == "of rank 1"

    def interrupted() -> Verdict:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        self_check.agree(store, "other", interrupted)
    assert self_check.agree(store, "other", interrupted).detail == "the rank that ran it was interrupted"


def test_explain_says_what_was_checked_and_when(runs: list[Subject]) -> None:
    section = explain().split("\n\n")[-1]
    assert section.splitlines()[0].endswith("float32") and "defective  serves " in section
    assert "head: will be checked when first used" in section and runs == []
    backend_of()
    section = explain().split("\n\n")[-1]
    assert "head: checked on 2026-01-02 03:04: passed" in section
    assert "groups: will be checked when first used" in section


def test_command_line(runs: list[Subject], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    assert check() == 0 and "no GPU here" in capsys.readouterr().out
    assert [subject for subject, _ in dispatch.check_all(CPU)] == runs
    assert [subject.work for subject in runs] == ["head", "head+bias", "head+softcap", "head+bias+softcap", "groups"]
    assert self_check.command(SUBJECT, torch.device("cuda", 1))[1:] == [
        *("-P", "-m", "g2rl_kernels.self_check_run", "defective", "cuda:1", "float32", "head")
    ]


def test_a_public_head_names_its_kind(runs: list[Subject]) -> None:
    s = testing.head_sample(testing.SMALL, options=testing.Options(bias="weight"))
    sequence_features(s.hidden, LMHead(s.head.weight, s.head.bias, softcap=7.0), s.targets, s.cu_seqlens)
    assert [subject.work for subject in runs] == ["head+bias+softcap"]
    assert self_checked_backend.DEFECT == "none"
