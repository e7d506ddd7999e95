"""Rows per second from a Parquet file to being served, by the code that ``featserve materialize`` runs."""

from __future__ import annotations

import multiprocessing
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from bench import project
from bench.report import ROOT, Figure

TARGET = 250_000
ROUNDS = 3


def measure(folder: Path) -> list[Figure]:
    """Load a million rows in no order into an empty store, each time in a process of its own; the last one stays."""
    seconds = []
    for _ in range(ROUNDS):
        remove_store(folder)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rows, took_s = pool.apply(project.materialize, (folder,))
        seconds.append(took_s)
    remove_store(folder)
    started = time.perf_counter()
    command = [sys.executable, "-m", "featserve", "materialize", "--project", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    command_s = time.perf_counter() - started
    spread = (
        f"{rows:,} rows in {', '.join(f'{s:.2f}' for s in sorted(seconds))} s; opening and closing the store included"
    )
    return [
        Figure("bulk load", rows / statistics.median(seconds), "rows/s", TARGET, note=spread),
        Figure("  the whole command", rows / command_s, "rows/s", note=f"{command_s:.2f} s with starting Python"),
    ]


def remove_store(folder: Path) -> None:
    shutil.rmtree(folder / ".featserve" / "store", ignore_errors=True)
