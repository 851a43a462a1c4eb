"""The control flow of benchmarks/gpu.sh: parts that end badly, too late or not at all, and what a second run does.

All that it calls is a stand-in here, `timeout` included, which makes limits short. What the parts themselves do is
rehearsed by `benchmarks/gpu.sh --rehearse FOLDER`.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.sh"
TOOLS = "bash cat cksum dirname env find mkdir mktemp nproc realpath rm sleep sort tail tee touch xargs".split()
MEASURED = "head groups small-head large".split()
SANITIZERS = "memcheck racecheck synccheck".split()
BESIDE = ["tests", *SANITIZERS]  # run at the same time
PARTS = ["bias", "head", "kernels", "groups", *BESIDE, "check", "small-head", "large", "step", "tune"]
NOT_REHEARSED = ["kernels", *SANITIZERS]
REHEARSED = [name for name in PARTS if name not in NOT_REHEARSED]

# A Python with every module but those of $ABSENT, whose parts do as $BEHAVIOUR says: "groups=3 large=sleep".
PYTHON = """\
import os, signal, sys, time
arguments = sys.argv[1:]
if arguments[0] == "-":
    print("a-chip 90a" if arguments[1] == "cuda" else "rehearsal 90a")
    sys.exit(int(os.environ.get("NO_GPU", "0")))
if arguments[0] == "-c":
    print(*(name for name in arguments[2:] if name in os.environ.get("ABSENT", "").split()))
    sys.exit()
files = [word for word in arguments if word.endswith(".json")]
names = {"--check": "check", "benchmarks.kernels": "kernels"}
name = os.environ.get("TOOL") or next((names[word] for word in arguments if word in names), "tests")
if files:
    name = os.path.basename(files[0])[:-5].removeprefix("a-chip-").removeprefix("rehearsal-")
does = dict(item.split("=") for item in os.environ.get("BEHAVIOUR", "").split()).get(name, "0")
def interrupted(*_):
    os.write(2, b"interrupted\\n")
    os._exit(130)
# No exception: `timeout` sends the signal twice, and the second one would come while the first one's is handled.
if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, interrupted)
with open(os.environ["CALLS"], "a") as calls:
    print(name, *arguments, file=calls)
print("output of", name, flush=True)
if does == "sleep":
    time.sleep(60)
sys.exit(int(does))
"""
STAND_INS = {
    "python3": 'exec "{python}" -S "{bin}/python.py" "$@"',
    "timeout": 'exec {timeout} "$1" --kill-after=1 2 "${{@:4}}"',
    "compute-sanitizer": 'export TOOL=$2; exec "${{@:7}}"',
    "cmake": 'echo building "$@"; [ "${{BUILD:-0}}" != hangs ] || exec sleep 60; exit "${{BUILD:-0}}"',
    "nvcc": "exit 0",
}


class Place:
    """A checkout with the script alone, a folder for results, and a PATH of stand-ins."""

    def __init__(self, folder: Path) -> None:
        self.root, self.bin, self.out = folder / "checkout", folder / "bin", folder / "out"
        self.calls = folder / "calls"
        for name in ("benchmarks", "csrc", "g2rl_kernels", "python", "tests"):
            (self.root / name).mkdir(parents=True)
        self.script = Path(shutil.copy(SCRIPT, self.root / "benchmarks"))
        self.bin.mkdir()
        for name in TOOLS:
            (self.bin / name).symlink_to(shutil.which(name) or pytest.skip(f"needs {name}"))
        (self.bin / "python.py").write_text(PYTHON)
        paths = {"python": sys.executable, "bin": self.bin, "timeout": shutil.which("timeout")}
        for name, text in STAND_INS.items():
            self.stand_in(name, f"#!{self.bin}/bash\n{text.format(**paths)}\n")

    def stand_in(self, name: str, text: str) -> None:
        (self.bin / name).write_text(text)
        (self.bin / name).chmod(0o755)

    def run(self, *arguments: str | Path, **environment: str) -> tuple[int, list[str]]:
        """Exit status and lines that the script itself printed."""
        self.calls.write_text("")
        given = {"PATH": str(self.bin), "CALLS": str(self.calls)} | environment
        command = [self.bin / "bash", self.script, *(arguments or (self.out,))]
        done = subprocess.run(command, env=given, capture_output=True, text=True, timeout=60)
        assert "unbound variable" not in done.stderr
        return done.returncode, [line for line in done.stdout.splitlines() if line.startswith("===")]

    @property
    def called(self) -> list[str]:
        """In the order of PARTS where they may run at the same time."""
        names = [line.split()[0] for line in self.calls.read_text().splitlines()]
        places = [place for place, name in enumerate(names) if name in BESIDE]
        for place, name in zip(places, sorted((names[i] for i in places), key=BESIDE.index), strict=True):
            names[place] = name
        return names

    def arguments(self, part: str) -> str:
        return next(line for line in self.calls.read_text().splitlines() if line.startswith(f"{part} "))


@pytest.fixture
def place(tmp_path: Path) -> Place:
    if not (shutil.which("bash") and shutil.which("timeout")):
        pytest.skip("needs bash and timeout")
    return Place(tmp_path)


def test_a_run_and_the_next(place: Place) -> None:
    status, lines = place.run()
    assert (status, place.called) == (0, PARTS), lines
    assert place.arguments("large").endswith("--op sequence_features --op token_logprobs --kind random")
    assert "--device cuda --shape llama3-8b-8192" in place.arguments("large")
    assert "-m benchmarks.once --backend cuda" in place.arguments("racecheck")
    for name in PARTS:
        assert (place.out / f"a-chip-{name}.log").read_text() == f"output of {name}\n"
    assert [line.split()[0] for line in (place.out / "a-chip-build.log").read_text().splitlines()] == ["building"] * 2

    status, lines = place.run()
    assert (status, place.called) == (0, [])
    assert {line for line in lines if "earlier" in line} == {f"=== {name}: done in an earlier run" for name in PARTS}
    (place.root / "csrc" / "new.cu").write_text("")
    (place.root / "csrc" / "readme.md").write_text("")
    assert place.run()[0] == 0 and place.called == []
    (place.root / "csrc" / "new.cu").write_text("other code")
    assert place.run()[0] == 0 and place.called == PARTS


def test_parts_that_do_not_end_well_are_named_and_run_again(place: Place) -> None:
    (place.bin / "compute-sanitizer").unlink()
    status, lines = place.run(BEHAVIOUR="groups=3 large=sleep", ABSENT="hypothesis gguf yaml")
    assert status == 1
    assert place.called == [name for name in PARTS if name not in (*SANITIZERS, "tests", "step")], "the others go on"
    for ending in ("groups: status 3", "large: status 124"):
        assert any(line.startswith(f"=== {ending} after ") for line in lines)
    assert "=== tests will be left out: Python has no hypothesis" in lines
    assert "=== step: left out, without gguf yaml" in lines
    assert "=== racecheck: left out, without compute-sanitizer" in lines
    left_out, failed = lines[-2:]
    assert set(left_out.removeprefix("=== left out: ").split()) == {"tests", *SANITIZERS, "step"}
    assert failed == "=== failed: groups (3) large (124)"
    status, lines = place.run(BEHAVIOUR="large=1")
    assert (status, place.called) == (1, ["groups", "tests", "large", "step"])
    assert lines[-1] == "=== failed: large (1)"


def test_a_build_that_fails_leaves_the_rest(place: Place) -> None:
    status, lines = place.run(BUILD="2")
    assert (status, place.called) == (1, PARTS)
    assert lines[-1] == "=== failed: build (2)"
    (place.bin / "nvcc").unlink()
    status, lines = place.run()
    assert status == 0 and any(line.startswith("=== no nvcc or no CMake") for line in lines)


def test_a_build_has_a_limit(place: Place) -> None:
    status, lines = place.run(BUILD="hangs", ONLY="groups")
    assert (status, place.called) == (1, ["groups"])
    assert lines[-1] == "=== failed: build (124)"


@pytest.mark.parametrize(
    ("arguments", "only", "built"),
    [([], "groups", True), ([], "tune", False), ([], "build", True), (["--rehearse"], "groups", False)],
)
def test_parts_alone(place: Place, arguments: list[str], only: str, built: bool) -> None:
    """With a build where they run its kernels, which a rehearsal does not."""
    status, _ = place.run(*arguments, place.out, ONLY=only)
    assert (status, place.called) == (0, [only] if only in PARTS else [])
    assert bool(list(place.out.glob("*-build.log"))) == built


def test_a_rehearsal_leaves_no_module(place: Place) -> None:
    assert place.run("--rehearse", place.out, ONLY="build")[0] == 0
    assert f"-DG2RL_OUTPUT_DIR={place.root}/build/rehearsal" in (place.out / "rehearsal-build.log").read_text()
    assert place.run(place.out, ONLY="build")[0] == 0
    assert f"-DG2RL_OUTPUT_DIR={place.root}/g2rl_kernels" in (place.out / "a-chip-build.log").read_text()


def test_a_part_that_does_not_exist_is_refused(place: Place) -> None:
    command = [place.bin / "bash", place.script, place.out]
    done = subprocess.run(command, env={"PATH": str(place.bin), "ONLY": "groups haed"}, capture_output=True, text=True)
    assert done.returncode == 2 and not place.out.exists()
    assert done.stderr == f"ONLY: expected some of build {' '.join(PARTS)}, found haed\n"


@pytest.mark.parametrize(
    ("send", "sent", "status", "running"),
    [
        (os.killpg, signal.SIGINT, 130, ["bias"]),
        (os.killpg, signal.SIGINT, 130, BESIDE),
        (os.kill, signal.SIGTERM, 143, ["bias"]),
    ],
    ids=["^C", "^C beside", "terminated"],
)
def test_a_signal_ends_parts_and_script(
    place: Place, send: Callable, sent: signal.Signals, status: int, running: list[str]
) -> None:
    """^C in a terminal reaches the script's process group, of which no part is."""
    behaviour = " ".join(f"{name}=sleep" for name in running)
    given = {"PATH": str(place.bin), "CALLS": str(place.calls), "BEHAVIOUR": behaviour, "ONLY": " ".join(running)}
    process = subprocess.Popen(
        [place.bin / "bash", place.script, place.out],
        env=given,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # What is ignored when a shell starts, it cannot trap.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and not (place.calls.exists() and set(running) <= set(place.called)):
        time.sleep(0.02)
    send(process.pid, sent)
    output, _ = process.communicate(timeout=30)
    assert process.returncode == status and output.endswith("=== stopped\n")
    assert place.called == running, "nothing else was started"
    logs = [(place.out / f"a-chip-{name}.log").read_text() for name in running]
    assert all("interrupted" in log for log in logs), "parts could end by themselves"


def test_another_chip_starts_anew(place: Place) -> None:
    assert place.run()[0] == 0
    (place.bin / "python.py").write_text(PYTHON.replace("a-chip", "another"))
    assert place.run()[0] == 0 and place.called == PARTS


def test_nothing_starts_without_a_gpu(place: Place) -> None:
    assert place.run(NO_GPU="1") == (1, []) and place.called == []


def test_a_rehearsal_runs_all_that_a_cpu_can(place: Place) -> None:
    status, lines = place.run("--rehearse", place.out)
    assert (status, place.called) == (0, REHEARSED)
    assert [line for line in lines if "left out" in line] == [
        f"=== {name}: left out, nothing runs on a GPU" for name in NOT_REHEARSED
    ]
    for name in MEASURED:
        assert "--device cpu --shape 48x3x64x1105" in place.arguments(name)
    assert {path.name for path in place.out.glob("*.log")} == {
        f"rehearsal-{name}.log" for name in (*REHEARSED, "build")
    }
    assert place.run("--rehearse", place.out)[0] == 0 and place.called == []


def test_a_rehearsal_is_not_mixed_with_readings(place: Place) -> None:
    """It needs a folder of its own, named from where the caller stands."""
    command = [place.bin / "bash", place.script, "--rehearse"]
    done = subprocess.run(command, env={"PATH": str(place.bin)}, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "--rehearse: expected a folder for what the rehearsal writes\n"
    given = os.environ | {"PATH": str(place.bin), "CALLS": str(place.calls)}
    subprocess.run([*command, "here"], env=given, cwd=place.bin, capture_output=True)
    assert (place.bin / "here" / "rehearsal-bias.log").exists()
