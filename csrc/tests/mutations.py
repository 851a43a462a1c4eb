"""Mistakes that the tests of csrc/cuda must notice: each is made in a copy of the sources, built for a CPU and run.

    python csrc/tests/mutations.py [words of names ...]

A mutation is caught if its program fails or does not end. Exits with 1 if one is not, or does not apply.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

CSRC = Path(__file__).resolve().parent.parent
ALIGNED = ("-fsanitize=alignment", "-fsanitize-undefined-trap-on-error")  # as a chip wants it
COMPILER = ("g++", "-std=c++20", "-O1", "-w", "-U_FORTIFY_SOURCE", *ALIGNED)
SECONDS = 240


@dataclass(frozen=True)
class Program:
    test: str
    sources: tuple[str, ...]


@dataclass(frozen=True)
class Mutation:
    """`old`, which occurs once in cuda/`file`, becomes `new`."""

    name: str
    program: str
    file: str
    old: str
    new: str


PROGRAMS = {
    "small": Program("test_cuda_small.cpp", ("tokens.cu",)),
    "projection": Program(
        "test_cuda_projection.cpp",
        ("projection.cu", "projection_sm80.cu", "projection_sm90.cu", "tensor_maps_sm90.cu"),
    ),
    "groups": Program("test_cuda_groups.cpp", ("groups.cu",)),
    "sm80": Program(
        "test_cuda_sm80.cpp",
        ("tokens.cu", "packing.cu", "statistics_sm80.cu", "residuals_sm80.cu", "grad_logits_sm80.cu"),
    ),
    "sm90": Program(
        "test_cuda_sm90.cpp",
        (
            "tokens.cu",
            "packing.cu",
            "tensor_maps_sm90.cu",
            "statistics_sm90.cu",
            "residuals_sm90.cu",
            "residuals_and_statistics_sm90.cu",
            "grad_logits_sm90.cu",
        ),
    ),
}

MUTATIONS = (
    Mutation(
        "merge: X is not moved to another maximum",
        "small",
        "tokens.cu",
        "X = fmaf(fmaf(S_s, moved, X_s), factor, X);",
        "X = fmaf(X_s, factor, X);",
    ),
    Mutation(
        "add_kept: sums of a segment are not carried on",
        "small",
        "tokens.cu",
        "if (of_segment != 0) load_words",
        "if (false) load_words",
    ),
    Mutation(
        "add_kept: segments count from the chunk",
        "small",
        "tokens.cu",
        "const int of_segment = (n - begin) % kSegment;",
        "const int of_segment = n - start;",
    ),
    Mutation(
        "add_kept: rows count from the response",
        "small",
        "tokens.cu",
        "const int row = n0 - p.first;",
        "const int row = n0 - start;",
    ),
    Mutation("add_targets: a sum in fp32", "small", "tokens.cu", "double sum = 0.;", "float sum = 0.f;"),
    Mutation(
        "merge: the target's weight is a quotient of its own",
        "small",
        "tokens.cu",
        "= weight * S_rest * slope;",
        "= p.a[n] * (S_rest / S) * slope;",
    ),
    Mutation(
        "merge: what R has of targets is taken for nothing",
        "small",
        "tokens.cu",
        "fmaf(p.a[n] * slope, S_rest, -residual_of_target(p.a[n], slope, e_y))",
        "p.a[n] * slope * S_rest",
    ),
    Mutation(
        "lse given: all of targets' residuals left to add_targets",
        "sm80",
        "options.h",
        "others < 0x1p-10f",
        "true",
    ),
    Mutation(
        "lse given: what lse was rounded by is a sure token's residual",
        "sm80",
        "options.h",
        "others < 0x1p-10f",
        "false",
    ),
    Mutation(
        "sm90, lse given: a target's residual lands in the next word",
        "sm90",
        "residuals_and_statistics_sm90.cu",
        "z[i] -= i / 2 * 8 + i % 2 == y ? residual : 0.f;",
        "z[i] -= i / 2 * 8 + (i + 1) % 2 == y ? residual : 0.f;",
    ),
    Mutation(
        "projection: fp32 residuals read at the stride of before",
        "projection",
        "projection_sm80.cu",
        "residuals[(i0 + i) * kStride + row + r]",
        "residuals[(i0 + i) * kResponses + row + r]",
    ),
    Mutation(
        "projection: fp32 weights read beyond a part's words",
        "projection",
        "projection_sm80.cu",
        "k < p.head.d && i0 + i < count",
        "k < p.head.d",
    ),
    Mutation(
        "add_targets: a word is added once for each of its tokens",
        "small",
        "tokens.cu",
        "if (first) R[",
        "if (t < length) R[",
    ),
    Mutation(
        "sm80 projection: the second fp16 term is taken for as large as the first",
        "projection",
        "projection_sm80.cu",
        "chains[kChains<T> - 1][i] / Split<T>::kDigits",
        "chains[kChains<T> - 1][i]",
    ),
    Mutation(
        "sm80 projection: a stage is read before its copies are waited for",
        "projection",
        "projection_sm80.cu",
        "copy_wait<kStages - 2>();",
        "copy_wait<kStages - 1>();",
    ),
    Mutation(
        "sm80 projection: terms are overwritten while they are read",
        "projection",
        "projection_sm80.cu",
        "__syncthreads();  // nobody reads the last step's terms and stage",
        "",
    ),
    Mutation(
        "sm90 projection: the second fp16 term is taken for as large as the first",
        "projection",
        "projection_sm90.cu",
        "sum / Split<T>::kDigits + z[",
        "sum + z[",
    ),
    Mutation(
        "sm90 projection: both warpgroups have the first features",
        "projection",
        "projection_sm90.cu",
        "tile.row + i * kColumns",
        "tile.row",
    ),
    Mutation(
        "sm90 projection: all parts have the terms of the first",
        "projection",
        "projection_sm90.cu",
        "tile.item * kWordsOfPart + k, tile.column",
        "k, tile.column",
    ),
    Mutation(
        "sm90 projection: sixteen words are as far as sixteen columns",
        "projection",
        "pipeline_sm90.h",
        "A_BY_COLUMNS ? 128 : 2",
        "2",
    ),
    Mutation(
        "sm90 projection: chains are as long as those of logits",
        "projection",
        "projection_sm90.cu",
        "kChainOfTerms = 1;",
        "kChainOfTerms = kChain;",
    ),
    Mutation(
        "groups: a response is its own peer",
        "groups",
        "groups.cu",
        "return i == j ? 0. : i == *of.best",
        "return i == *of.best",
    ),
    Mutation(
        "groups: sums of half of the warps are lost",
        "groups",
        "groups.cu",
        "for (int half = kWarps / 2;",
        "for (int half = kWarps / 4;",
    ),
    Mutation(
        "sm80: one sum over a long response",
        "sm80",
        "residuals_sm80.cu",
        "    if ((tile + 1) % (kSegment / kTile) == 0) end_segment();\n",
        "",
    ),
    Mutation(
        "sm90: one sum over a long response",
        "sm90",
        "residuals_sm90.cu",
        "group.run % kGroupsOfSegment == 1",
        "group.response >= 0",
    ),
    Mutation(
        "sm90, lse given: one sum over a long response",
        "sm90",
        "residuals_and_statistics_sm90.cu",
        "group.run % kGroupsOfSegment == 1",
        "group.response >= 0",
    ),
    Mutation(
        "sm80: a stage is read before its copies are waited for",
        "sm80",
        "pipeline_sm80.h",
        "copy_wait<kStages - 2>();",
        "copy_wait<kStages - 1>();",
    ),
    Mutation(
        "sm80: a stage is read before other threads' copies are there",
        "sm80",
        "pipeline_sm80.h",
        "copy_wait<kStages - 2>();\n        __syncthreads();",
        "copy_wait<kStages - 2>();",
    ),
    Mutation(
        "sm80: copies go to the stage that is being read",
        "sm80",
        "pipeline_sm80.h",
        "load(stage == 0 ? kStages - 1 : stage - 1);",
        "load(stage);",
    ),
    Mutation(
        "sm80: fragments of B are loaded in A's order",
        "sm80",
        "pipeline_sm80.h",
        "lane % 8 + lane / 16 * 8, chunk + lane / 8 % 2",
        "lane % 16, chunk + lane / 16",
    ),
    Mutation(
        "sm80: words beyond the vocabulary count",
        "sm80",
        "statistics_sm80.cu",
        "word == y[row] || word >= p.head.V ? masked",
        "word == y[row] ? masked",
    ),
    Mutation(
        "sm80: tokens of the next response are read",
        "sm80",
        "residuals_sm80.cu",
        "hidden.stride, end, hidden.aligned}",
        "hidden.stride, hidden.end, hidden.aligned}",
    ),
    Mutation(
        "sm80: sums of tokens meet the wrong lanes",
        "sm80",
        "residuals_sm80.cu",
        "exchange<8, 16>(x), exchange<4, 8>(x), exchange<2, 4>(x);",
        "exchange<8, 8>(x), exchange<4, 4>(x), exchange<2, 2>(x);",
    ),
    Mutation(
        "sm90: copies do not wait for a free stage",
        "sm90",
        "pipeline_sm90.h",
        """barrier_wait(ring.empty(), ring.parity ^ 1);
      __syncwarp();""",
        "__syncwarp();",
    ),
    Mutation(
        "sm90: a lane that copies nothing is left behind",
        "sm90",
        "pipeline_sm90.h",
        """barrier_wait(ring.empty(), ring.parity ^ 1);
      __syncwarp();""",
        """__syncwarp();
      barrier_wait(ring.empty(), ring.parity ^ 1);""",
    ),
    Mutation(
        "sm90: products do not wait for their stage",
        "sm90",
        "pipeline_sm90.h",
        "barrier_wait(ring.full(), ring.parity);\n    const uint64_t a",
        "const uint64_t a",
    ),
    Mutation(
        "sm90: a stage is released while it is read",
        "sm90",
        "pipeline_sm90.h",
        "wgmma_wait<1>();\n      release(ring.back(1));",
        "release(ring.back(0));",
    ),
    Mutation(
        "sm90: sums are read before the products have ended",
        "sm90",
        "pipeline_sm90.h",
        "held.at_most<0>();",
        "held.at_most<1>();",
    ),
    Mutation(
        "sm90: each thread of a row has a reference of its own",
        "sm90",
        "statistics_sm90.cu",
        "references[q] = fmaxf(references[q], __shfl_xor_sync(kAllLanes, references[q], other));",
        "(void)other;",
    ),
    Mutation(
        "sm90: roots lie as their words do",
        "sm90",
        "tokens.cu",
        "return thread / 4 * 32 + i / 2 * 8 + thread % 4 * 2 + i % 2;",
        "return 8 * thread + i;",
    ),
    Mutation("sm90: a warpgroup keeps its turn", "sm90", "pipeline_sm90.h", "    turn.pass();\n    if", "    if"),
    Mutation(
        "sm90: both warpgroups multiply the first rows",
        "sm90",
        "pipeline_sm90.h",
        "ring.a() + consumer * (kBytesA / kConsumers)",
        "ring.a()",
    ),
    Mutation("sm90: eight rows are 512 bytes", "sm90", "sm90.h", "1024 >> 4", "512 >> 4"),
    Mutation(
        "sm90: words beyond the vocabulary count",
        "sm90",
        "statistics_sm90.cu",
        "v == y[i / 2 % 2] || v >= p.head.V ? masked",
        "v == y[i / 2 % 2] ? masked",
    ),
    Mutation(
        "sm90: what follows a response is multiplied by 0",
        "sm90",
        "residuals_sm90.cu",
        "masked : n < 0 ? 0.f : z[i]",
        "masked : z[i]",
    ),
    Mutation(
        "sm90: one arrival stands for a warp of writers",
        "sm90",
        "tiles_sm90.h",
        "barrier_init(shared_address(&written[i]), kWriters);",
        "barrier_init(shared_address(&written[i]), kWriters / kWarp);",
    ),
    Mutation(
        "sm90: columns are overwritten while they are read",
        "sm90",
        "tiles_sm90.h",
        "barrier_wait(shared_address(&read[i % 2]), (i / 2 & 1) ^ 1);",
        "",
    ),
    Mutation(
        "sm90: lse given, columns may be overwritten before their sums are stored",
        "sm90",
        "residuals_and_statistics_sm90.cu",
        """    store_sums(of_tile.sums[at.row / kGroupRows], z);
    scratch.handover.was_read(calls);
""",
        """    scratch.handover.was_read(calls);
    store_sums(of_tile.sums[at.row / kGroupRows], z);
""",
    ),
    Mutation(
        "sm90: gradients' rows may be overwritten before the second is read",
        "sm90",
        "grad_logits_sm90.cu",
        "if (q == 1) scratch.handover.was_read(calls);",
        "if (q == 0) scratch.handover.was_read(calls);",
    ),
    Mutation(
        "sm90: residuals' columns may be overwritten before they are read",
        "sm90",
        "residuals_sm90.cu",
        """    add(tile, scratch.columns[calls % 2], z, held);
    scratch.handover.was_read(calls);
""",
        """    scratch.handover.was_read(calls);
    add(tile, scratch.columns[calls % 2], z, held);
""",
    ),
    Mutation(
        "merge: its launch asks for too little shared memory",
        "small",
        "tokens.cu",
        "kThreads, kThreads * int(sizeof(float))}, stream, merge_kernel",
        "kThreads, kWarp * int(sizeof(float))}, stream, merge_kernel",
    ),
    Mutation(
        "sm90: an exchange keeps the other half",
        "sm90",
        "residuals_and_statistics_sm90.cu",
        "if (exchange<12, 8>(z)) first += 6;",
        "if (!exchange<12, 8>(z)) first += 6;",
    ),
    Mutation(
        "sm90: rows are written before all have added the last ones' sums",
        "sm90",
        "residuals_and_statistics_sm90.cu",
        "named_barrier(3, kWriters);",
        "",
    ),
    Mutation(
        "sm90: the last tile's sums are not added",
        "sm90",
        "residuals_and_statistics_sm90.cu",
        "i <= last + 2",
        "i <= last + 1",
    ),
    Mutation(
        "sm90: sums are no pairs in memory",
        "sm90",
        "residuals_and_statistics_sm90.cu",
        "alignas(16) float sums",
        "float sums",
    ),
    Mutation(
        "sm90: lse given, what follows a response is multiplied by 0",
        "sm90",
        "residuals_and_statistics_sm90.cu",
        "n[i / 2 % 2] < 0 ? 0.f : z[i]",
        "z[i]",
    ),
    Mutation(
        "sm90: lse given, words beyond the vocabulary count",
        "sm90",
        "residuals_and_statistics_sm90.cu",
        "i / 4 * 8 + i % 2 >= room ? masked",
        "false ? masked",
    ),
    Mutation(
        "sm90: lse given, a target counts for all threads of its row",
        "sm90",
        "residuals_and_statistics_sm90.cu",
        " && y % 8 < 2",
        "",
    ),
    Mutation(
        "sm90: gradients count words from the first of the strip",
        "sm90",
        "grad_logits_sm90.cu",
        "GradRow::of(p, n, tile.column)",
        "GradRow::of(p, n, p.strip.v_start)",
    ),
    Mutation(
        "sm90: gradients of a tile take the rows of the next",
        "sm90",
        "grad_logits_sm90.cu",
        "    ++calls;",
        "    calls += calls == 0 ? 2 : 1;",
    ),
    Mutation("sm90: a run is a group short", "sm90", "packing.cu", "groups - g,", "groups - g - 1,"),
    Mutation(
        "sm90: products start without a fence",
        "sm90",
        "pipeline_sm90.h",
        "  wgmma_fence();\n",
        "",
    ),
    Mutation(
        "sm90: the copy engine is not told of barriers",
        "sm90",
        "pipeline_sm90.h",
        "    barrier_init_done();\n",
        "",
    ),
    Mutation(
        "sm90: a thread stores into a stage",
        "sm90",
        "pipeline_sm90.h",
        "queue[kTiles - 1] = kNoTile;",
        "queue[kTiles - 1] = kNoTile, reinterpret_cast<uint8_t*>(queue)[-kQueue] = 0;",
    ),
    Mutation(
        "sm90: warpgroups take more registers than the copying one gives",
        "sm90",
        "pipeline_sm90.h",
        "registers_more<232>();",
        "registers_more<240>();",
    ),
    Mutation("sm90: more stages than shared memory has", "sm90", "pipeline_sm90.h", "kStages = 5;", "kStages = 6;"),
    Mutation(
        "sm90: a turn that is passed is not taken",
        "sm90",
        "pipeline_sm90.h",
        "  if (consumer == 0) turn.take();\n",
        "",
    ),
    Mutation(
        "sm90: writers meet at the barrier of a turn",
        "sm90",
        "residuals_and_statistics_sm90.cu",
        "named_barrier(3, kWriters);",
        "named_barrier(2, kWriters);",
    ),
    Mutation(
        "sm90: lanes exchange at different instructions",
        "sm90",
        "tiles_sm90.h",
        "__shfl_xor_sync(kAllLanes, odd ? x[i] : x[i + 1], 1);",
        "odd ? __shfl_xor_sync(kAllLanes, x[i], 1) : __shfl_xor_sync(kAllLanes, x[i + 1], 1);",
    ),
)


def compile_object(source: Path, out: Path) -> Path:
    subprocess.run([*COMPILER, "-x", "c++", "-c", str(source), "-o", str(out)], check=True)
    return out


def fails(root: Path, program: Program, objects: list[Path]) -> bool:
    binary = root / "test"
    test = root / "tests" / program.test
    subprocess.run([*COMPILER, str(test), *map(str, objects), "-o", str(binary)], check=True)
    try:
        return subprocess.run([str(binary)], capture_output=True, timeout=SECONDS).returncode != 0
    except subprocess.TimeoutExpired:
        return True


class CleanObjects:
    """Objects of unchanged sources, each made when it is first needed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __getitem__(self, source: str) -> Path:
        out = self._folder / f"{source}.o"
        return out if out.exists() else compile_object(CSRC / "cuda" / source, out)


def caught(mutation: Mutation, clean: CleanObjects) -> bool:
    program = PROGRAMS[mutation.program]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for room in ("cuda", "tests"):
            shutil.copytree(CSRC / room, root / room)
        target = root / "cuda" / mutation.file
        text = target.read_text()
        if text.count(mutation.old) != 1:
            raise ValueError(
                f"{mutation.name}: expected its text once in {mutation.file}, found {text.count(mutation.old)}"
            )
        target.write_text(text.replace(mutation.old, mutation.new))
        changed = [name for name in program.sources if name == mutation.file or mutation.file.endswith(".h")]
        objects = [
            compile_object(root / "cuda" / name, root / f"{name}.o") if name in changed else clean[name]
            for name in program.sources
        ]
        return fails(root, program, objects)


def main() -> int:
    words = sys.argv[1:]
    chosen = [m for m in MUTATIONS if not words or any(word in m.name for word in words)]
    missed = 0
    with tempfile.TemporaryDirectory() as folder:
        clean = CleanObjects(Path(folder))
        for mutation in chosen:
            ok = caught(mutation, clean)
            missed += not ok
            print("caught" if ok else "MISSED", mutation.name, flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} mutations caught")
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
