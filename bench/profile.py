"""Where a loaded server's Python spends its time: py-spy's samples of who holds the interpreter's lock.

What the transports do outside the lock, in Rust or C++, is not in it. Linux lets py-spy look into another process as
root, or where ``kernel.yama.ptrace_scope`` is 0.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections import Counter
from itertools import product
from pathlib import Path

from bench import h2load, load, servers
from bench.project import ENTITIES
from bench.report import Figure

TRANSPORTS = ("native", "grpcio")
KEYS = (1, 100)
SAMPLES_PER_S, SECONDS = 500, 6
TOLD = 12
AROUND = ("runpy", "threading.py", "click/", "featserve/cli/", "__main__", "uvloop/__init__", "server/app.py")
"""Frames that hold all others."""


def measure(folder: Path) -> list[Figure]:
    """Return for each transport and size of request the functions that most samples are in."""
    figures = []
    for transport, keys in product(TRANSPORTS, KEYS):
        body = next(load.bodies(keys, ENTITIES, 1))
        with servers.ours(folder, transport) as server:
            h2load.run(server.address, body, seconds=0.5)
            stacks = sampled(server.processes()[0].pid, server.address, body)
        total = sum(stacks.values())
        within, itself = Counter[str](), Counter[str]()
        for stack, samples in stacks.items():
            itself[stack[-1]] += samples
            for frame in set(stack):
                within[frame] += samples
        told = [frame for frame, _ in within.most_common() if not any(part in frame for part in AROUND)]
        figures.append(Figure(f"{transport}, {keys} {'key' if keys == 1 else 'keys'}", total, "samples"))
        for frame in told[:TOLD]:
            note = f"{100 * itself[frame] / total:.0f} % in its own lines"
            figures.append(Figure(f"  {frame}", 100 * within[frame] / total, "%", note=note))
    return figures


def sampled(pid: int, address: str, body: bytes) -> Counter[tuple[str, ...]]:
    """Load a server while py-spy looks at it; return the samples of each stack, outermost frame first."""
    with tempfile.TemporaryDirectory(prefix="featserve-profile-") as folder:
        out = Path(folder) / "stacks"
        options = ["--gil", "--nolineno", "--format=raw", f"--rate={SAMPLES_PER_S}", f"--duration={SECONDS}"]
        command = [str(Path(sys.executable).parent / "py-spy"), "record", *options, f"--output={out}", f"--pid={pid}"]
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as looking:
            h2load.run(address, body, seconds=SECONDS + 1.0)
            said = looking.communicate()[1]
        if looking.returncode:
            raise RuntimeError(f"`{' '.join(command)}` failed:\n{said}")
        lines = [line.rsplit(" ", 1) for line in out.read_text(encoding="utf-8").splitlines()]
    stacks = Counter[tuple[str, ...]]()
    for stack, samples in lines:
        stacks[tuple(stack.split(";"))] += int(samples)
    return stacks
