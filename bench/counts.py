"""``make counts``: instructions and allocations of a request, counted by valgrind and held against bench/counts.json.

Times differ from run to run and from machine to machine; counts hardly do, so a change that makes a request dearer is
seen at once, on a busy machine too. A count is that of 2 N requests less that of N, by N: starting cancels. Fails where
instructions rose by more than 3 % or allocations at all; ``--accept`` makes what was counted the baseline. A baseline
is that of one version of Python: on another nothing is counted, which is a failure too, unless ``--may-skip`` is given.

What would make counts depend on the machine is off: NumPy takes the code that every processor can run (valgrind itself
shows none with AVX-512), and hashes have a fixed seed. What is left, such as the C library's memcpy, is within the 3 %.
Allocations are calls of the C library's allocator, by Python (made to use it), NumPy and RocksDB alike.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

import numpy as np

from bench import project
from bench.counted import ENTITIES, MARK, REQUESTS
from bench.report import ROOT

BASELINE = ROOT / "bench" / "counts.json"
INSTRUCTIONS = 0.03
ALLOCATORS = frozenset(("malloc", "calloc", "realloc", "posix_memalign", "aligned_alloc", "memalign"))
COUNTED = ("numpy", "protobuf", "rocksdict")
PROJECT = "project"

Counts = dict[str, dict[str, int]]
"""For each case its "instructions" and "allocations"."""


def count() -> Counts:
    """Count what a request of each case takes: two runs of valgrind, one beside the other."""
    with tempfile.TemporaryDirectory(prefix="featserve-counts-") as name, ThreadPoolExecutor(2) as pool:
        folder = Path(name)
        project.make(folder / PROJECT, ENTITIES)
        project.materialize(folder / PROJECT)
        usual = pool.submit(_run, folder, "usual", {})
        bare = pool.submit(_run, folder, "bare", {"PYTHONMALLOC": "malloc"})
        run, allocated = _each(usual.result(), instructions), _each(bare.result(), allocations)
    return {case: {"instructions": run[case], "allocations": allocated[case]} for case in run}


def _run(folder: Path, name: str, settings: dict[str, str]) -> dict[str, list[Path]]:
    """Run the requests under valgrind; return for each case its dumps: of N requests, and of 2 N."""
    out = folder / f"{name}.callgrind"
    own = shutil.copytree(folder / PROJECT, folder / name)  # as one process at a time may write
    options = ["--tool=callgrind", f"--dump-before={MARK}", f"--callgrind-out-file={out}"]
    command = ["valgrind", *options, sys.executable, "-m", "bench.counted", str(own)]
    slow = " ".join(np.show_config(mode="dicts")["SIMD Extensions"].get("found", []))
    fixed = {"PYTHONHASHSEED": "0", "NPY_DISABLE_CPU_FEATURES": slow, **settings}
    ran = subprocess.run(command, cwd=ROOT, env=os.environ | fixed, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(f"`{' '.join(command)}` failed:\n{ran.stdout}{ran.stderr}")
    # Dump 1 ends with the first case's warm-up, and each case makes three.
    dumps = [[out.with_name(f"{out.name}.{3 * i + j}") for j in (2, 3)] for i in range(len(ran.stdout.splitlines()))]
    return dict(zip(ran.stdout.splitlines(), dumps, strict=True))


def _each(dumps: dict[str, list[Path]], counted: Callable[[Path], int]) -> dict[str, int]:
    return {case: round((counted(twice) - counted(once)) / REQUESTS) for case, (once, twice) in dumps.items()}


def instructions(dump: Path) -> int:
    """Return the instructions of a dump of callgrind."""
    (total,) = (line for line in dump.read_text().splitlines() if line.startswith("totals:"))
    return int(total.split()[1])


def allocations(dump: Path) -> int:
    """Return the calls of an allocator in a dump, which names a function once, "(number) name", and then "(number)"."""
    names: dict[str, str] = {}
    found, callee = 0, ""
    for line in dump.read_text().splitlines():
        key, _, value = line.partition("=")
        if key in ("fn", "cfn"):
            callee, _, name = value.partition(" ")
            if name:
                names[callee] = name
        elif key == "calls" and names[callee] in ALLOCATORS:
            found += int(value.split()[0])
    return found


def compare(counts: Counts, baseline: Counts) -> list[str]:
    """Print counts beside a baseline; return what is dearer than that allows, and which cases it does not have."""
    worse = []
    print(f"{'':28}{'instructions':>14}{'baseline':>12}{'':>9}{'allocations':>14}{'baseline':>12}")
    for case, counted in counts.items():
        if case not in baseline:
            worse.append(f"{case}: no baseline")
            continue
        expected = baseline[case]
        more = counted["instructions"] / expected["instructions"] - 1
        cells = f"{counted['instructions']:14,}{expected['instructions']:12,}{100 * more:+8.1f}%"
        print(f"{case:28}{cells}{counted['allocations']:14,}{expected['allocations']:12,}")
        if more > INSTRUCTIONS:
            worse.append(f"{case}: {100 * more:.1f} % more instructions; {100 * INSTRUCTIONS:.0f} % are allowed")
        if counted["allocations"] > expected["allocations"]:
            worse.append(f"{case}: {counted['allocations'] - expected['allocations']:,} more allocations")
        elif more < -INSTRUCTIONS or counted["allocations"] < expected["allocations"]:
            print(f"  {case} is cheaper than the baseline: `make counts-accept` keeps that")
    return worse


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.counts", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--accept", action="store_true", help=f"write {BASELINE.relative_to(ROOT)}")
    parser.add_argument("--may-skip", action="store_true", help="succeed where there is no baseline for this Python")
    asked = parser.parse_args()
    baselines = json.loads(BASELINE.read_text(encoding="utf-8")) if BASELINE.exists() else {}
    here = f"{platform.python_implementation()} {sys.version_info.major}.{sys.version_info.minor} {platform.machine()}"
    packages = {name: version(name) for name in COUNTED}
    if here not in baselines and not asked.accept:
        print(f"Not counted: no baseline for {here}, only for {', '.join(baselines)}; `make counts-accept` makes one")
        return 0 if asked.may_skip else 1
    if shutil.which("valgrind") is None:
        print("counts need valgrind: apt-get install valgrind", file=sys.stderr)
        return 1
    print("Counting, under valgrind, which takes two or three minutes ...", flush=True)
    counts = count()
    worse = compare(counts, baselines.get(here, {}).get("counts", {}))
    if asked.accept:
        baselines[here] = {"packages": packages, "counts": counts}
        BASELINE.write_text(json.dumps(baselines, indent=2) + "\n", encoding="utf-8")
        print(f"Written to {BASELINE.relative_to(ROOT)}")
        return 0
    if packages != (before := baselines[here]["packages"]):
        print(f"The baseline is that of {before}; here are {packages}")
    print("\n".join(worse) or "No request is dearer than the baseline.")
    return bool(worse)


if __name__ == "__main__":
    sys.exit(main())
