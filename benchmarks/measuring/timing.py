"""Clocks, memory, the machine's description and the best rate that its matrix product reaches."""

from __future__ import annotations

import ctypes
import datetime
import gc
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

Run = Callable[[], Any]

# Calls shorter than this are repeated inside one sample: the clock and the call around it cost a microsecond.
_SHORTEST_SAMPLE_S = 2e-3
# More than the last-level cache of any GPU so far.
_FLUSH_BYTES = 256 << 20
# 5 ms, for a call that takes longer to return waits for the GPU itself.
_MOST_FLUSHES = 50
# For which other processes are watched.
_WATCHED_S = 0.5


@dataclass(frozen=True)
class Timing:
    """Seconds of one candidate by round; round i of all candidates of a case ran side by side.

    Attributes:
        by_round: one entry a round; None where a slow candidate sat out.
        launch: seconds until a call returns on an idle GPU, which may still be at work; None on a CPU.
    """

    by_round: tuple[float | None, ...]
    launch: float | None = None

    @property
    def samples(self) -> list[float]:
        return [seconds for seconds in self.by_round if seconds is not None]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def spread(self) -> float | None:
        """Interquartile range; None of fewer than three samples."""
        return interquartile_range(self.samples)

    @property
    def fastest(self) -> float:
        return min(self.samples)

    def ratio(self, other: Timing) -> tuple[float, float | None]:
        """Median and spread of this over `other`, round by round: a machine that slows down slows both."""
        ratios = [
            mine / theirs
            for mine, theirs in zip(self.by_round, other.by_round, strict=True)
            if mine is not None and theirs is not None
        ]
        return statistics.median(ratios), interquartile_range(ratios)


def interquartile_range(values: list[float]) -> float | None:
    if len(values) < 3:
        return None
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return high - low


def turns(names: Iterable[str], i: int) -> list[str]:
    """The order of round i, which starts one further along than the one before."""
    order = list(names)
    first = i % len(order)
    return order[first:] + order[:first]


def interleave(runs: Mapping[str, Run], device: torch.device, rounds: int, limit_s: float) -> dict[str, Timing]:
    """Time several callables in one go: every round runs each of them once, starting one further along.

    Args:
        runs: by name; each has run once before, so that nothing is loaded or compiled here.
        rounds: samples of each.
        limit_s: a candidate that has used more than this sits out the remaining rounds; everyone gets one sample.
    """
    clock = _CudaClock() if device.type == "cuda" else _CpuClock()
    names = list(runs)
    repeats = {name: max(1, round(_SHORTEST_SAMPLE_S / max(clock(runs[name], 1), 1e-7))) for name in names}
    seconds: dict[str, list[float | None]] = {name: [] for name in names}
    spent = dict.fromkeys(names, 0.0)
    gc.collect()
    gc.disable()
    try:
        for i in range(rounds if names else 0):
            for name in turns(names, i):
                if i > 0 and spent[name] > limit_s:
                    seconds[name].append(None)
                    continue
                sample = clock(runs[name], repeats[name])
                seconds[name].append(sample)
                spent[name] += sample * repeats[name]
    finally:
        gc.enable()
    return {name: Timing(tuple(samples), clock.launch(runs[name])) for name, samples in seconds.items()}


class _CpuClock:
    """Seconds of one call, the release of its results included."""

    def __call__(self, run: Run, repeats: int) -> float:
        start = time.perf_counter()
        for _ in range(repeats):
            run()
        return (time.perf_counter() - start) / repeats

    def launch(self, run: Run) -> None:
        return None


class _CudaClock:
    """Seconds of one call between CUDA events, as in training: other layers have left the L2 cache cold, and the GPU
    has so much to do beforehand that it never waits for the host. What the host takes is `launch`.
    """

    def __init__(self) -> None:
        self.cache = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device="cuda")
        self.launches: dict[Run, float] = {}
        self.cache.zero_()
        self.flush_s = self._between_events(self.cache.zero_)

    def __call__(self, run: Run, repeats: int) -> float:
        flushes = 1 + min(_MOST_FLUSHES, math.ceil(2 * self.launch(run) / self.flush_s))
        total = 0.0
        for _ in range(repeats):
            for _ in range(flushes):
                self.cache.zero_()
            total += self._between_events(run)
        return total / repeats

    def launch(self, run: Run) -> float:
        if run not in self.launches:
            samples = []
            for _ in range(3):
                torch.cuda.synchronize()
                start = time.perf_counter()
                run()
                samples.append(time.perf_counter() - start)
            torch.cuda.synchronize()
            self.launches[run] = statistics.median(samples)
        return self.launches[run]

    def _between_events(self, run: Run) -> float:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3


def kernel_launches(run: Run) -> int:
    """CUDA kernels that one call launches."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def extra_memory(run: Run, device: torch.device) -> tuple[int | None, Any]:
    """Bytes that one call takes at its peak beyond what was there before, its results included; and what it returns.

    None where they cannot be known: see `peak_memory`.
    """
    before, peak, result = peak_memory(run, device)
    return None if before is None or peak is None else max(0, peak - before), result


def peak_memory(run: Run, device: torch.device) -> tuple[int | None, int | None, Any]:
    """Bytes held before one call and at its peak, and what it returns.

    On a CPU that is the process's resident memory, which counts every allocator and library's scratch space: free
    memory is handed back to the kernel, and the kernel's own high-water mark is reset, right before. It is exact to
    about 1 MB. None where the kernel offers no such mark.
    """
    release_free_memory()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = run()
        torch.cuda.synchronize(device)
        return before, torch.cuda.max_memory_allocated(device), result
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None, None, run()
    before = _status("VmRSS")
    result = run()
    return before, _status("VmHWM"), result


def release_free_memory() -> None:
    """Hand memory that nobody uses back to the kernel, where the C library can."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _status(key: str) -> int:
    """A size in bytes from the kernel's account of this process."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) << 10
    raise KeyError(key)


def available_memory(device: torch.device) -> int | None:
    """Bytes that a candidate may still take; None where unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    path = Path("/proc/meminfo")
    if not path.is_file():
        return None
    lines = dict(line.split(":") for line in path.read_text().splitlines())
    return int(lines["MemAvailable"].split()[0]) << 10


def best_rate(dtype: torch.dtype, device: torch.device) -> float:
    """Operations a second of the library's fastest square product."""
    runs: dict[str, Run] = {}
    work: dict[str, int] = {}
    limit_s = 3.0
    for n in (4096, 8192, 16384) if device.type == "cuda" else (512, 1024, 2048, 3072):
        a, b, out = (torch.randn(n, n, device=device).to(dtype) for _ in range(3))
        runs[f"{n}"] = partial(torch.mm, a, b, out=out)
        work[f"{n}"] = 2 * n**3
        if device.type == "cpu":
            start = time.perf_counter()
            runs[f"{n}"]()
            if time.perf_counter() - start > limit_s / 8:  # fp16 where the CPU has none: the next size takes minutes
                break
    timings = interleave(runs, device, rounds=9, limit_s=limit_s)
    return max(work[name] / timing.fastest for name, timing in timings.items())


# What lowers the instruction set of our kernels, of oneDNN's, MKL's and PyTorch's products, each for itself.
_CHOICES = ("G2RL_CPU_ISA", "DNNL_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS", "ATEN_CPU_CAPABILITY")


def machine(device: torch.device) -> dict[str, Any]:
    """What a reading depends on beside the code: device, threads, instruction set, versions, commit, load and date."""
    facts: dict[str, Any] = {
        "device": device.type,
        "name": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": _instruction_sets(),
        "choices": {name: os.environ[name] for name in _CHOICES if os.environ.get(name)},
        "memory_gb": round(_total_memory(device) / 1e9, 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "busy_cores": busy_cores(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
        **_commit(),
    }
    if device.type == "cuda":
        facts["cuda"] = torch.version.cuda
        facts["compute_capability"] = ".".join(map(str, torch.cuda.get_device_capability(device)))
    return facts


def _cpu_name() -> str:
    path = Path("/proc/cpuinfo")
    if path.is_file():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _instruction_sets() -> str:
    """PyTorch's own choice, and the matrix units that decide what a bf16 product costs."""
    path = Path("/proc/cpuinfo")
    flags = path.read_text().split() if path.is_file() else []
    found = [flag for flag in ("avx512_bf16", "amx_bf16", "avx512_fp16", "bf16") if flag in flags]  # the last is ARM's
    return " ".join([torch.backends.cpu.get_cpu_capability(), *found])


def _total_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def busy_cores() -> float | None:
    """Cores that other processes keep busy while this one waits; they make every reading on a CPU unreliable."""

    def jiffies() -> tuple[int, int]:
        fields = [int(field) for field in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        return sum(fields), fields[3] + fields[4]

    if not Path("/proc/stat").is_file():
        return None
    total, idle = jiffies()
    time.sleep(_WATCHED_S)
    total, idle = (after - before for after, before in zip(jiffies(), (total, idle), strict=True))
    return round((1 - idle / total) * (os.cpu_count() or 1), 2) if total else None


def _version(distribution: str) -> str | None:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(distribution)
    except PackageNotFoundError:
        return None


def _commit() -> dict[str, Any]:
    """The checkout's commit, and whether files differ from it; empty outside of a repository."""
    root = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # What the suite itself writes does not change what it measures.
        code = (":/", ":(top,exclude)benchmarks/results", ":(top,exclude)README.md")
        changes = git("status", "--porcelain", "--", *code)
        return {"commit": git("rev-parse", "--short=12", "HEAD"), "dirty": bool(changes)}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}


def machine_line(facts: Mapping[str, Any]) -> str:
    """One line for above a table: what ran, and when."""
    commit = f"{facts['commit']}{' with changes' if facts['dirty'] else ''}" if facts["commit"] else "no commit"
    return f"{hardware_line(facts)}; commit {commit}; {facts['date']}"


def hardware_line(facts: Mapping[str, Any]) -> str:
    """The device, and the libraries that decide how fast it is."""
    triton = f", triton {facts['triton']}" if facts["triton"] else ""
    where = f"{facts['name']} ({facts['isa']}), {facts['cores']} cores, {facts['threads']} threads"
    if facts["device"] == "cuda":
        where = f"{facts['name']} (sm {facts['compute_capability']}, CUDA {facts['cuda']})"
    chosen = "".join(f", {name}={value}" for name, value in facts.get("choices", {}).items())
    return f"{where}{chosen}, {facts['memory_gb']} GB; torch {facts['torch']}{triton}"
