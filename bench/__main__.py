"""``python -m bench``: run the benchmarks that are named, or all; print tables and keep the figures of each in
bench/results/latest.json, which ``--show`` prints.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from bench import (
    bulk_load,
    freshness,
    grid,
    in_process,
    memory,
    native,
    overload,
    profile,
    project,
    report,
    server,
    telemetry,
    transform,
    windows,
    workers,
    writes,
)
from bench.report import ROOT, Figure


def pieces(folder: Path) -> list[Figure]:
    """Run the micro-benchmarks of ``bench/pieces`` with pytest-benchmark."""
    path = folder / "pieces.json"
    options = ["--benchmark-disable-gc", "--benchmark-json", str(path)]
    run("pytest", "-q", "bench/pieces", *options)
    found = json.loads(path.read_text(encoding="utf-8"))["benchmarks"]
    return [
        Figure(
            b["name"].removeprefix("test_"),
            b["stats"]["median"] * 1e6,
            "us",
            note=f"least {b['stats']['min'] * 1e6:.1f}",
        )
        for b in found
    ]


def temporal_join(folder: Path) -> list[Figure]:
    """Join 10 million rows to a million labels, beside DuckDB's own ASOF join."""
    found = json.loads(run("bench.offline_join"))
    return [
        Figure("ours", found["ours_seconds"], "s"),
        Figure("DuckDB ASOF", found["asof_seconds"], "s"),
        Figure("ours to ASOF", found["ratio"], ""),
        Figure("labels lost", found["rows_lost"], "", 0, at_most=True),
    ]


def window_join(folder: Path) -> list[Figure]:
    """Aggregate 10 million events over windows at a million labels, beside a window query that is written by hand."""
    found = json.loads(run("bench.offline_windows"))
    return [
        Figure("ours", found["ours_seconds"], "s", note=f"{found['late']:.0%} of the events are known late"),
        Figure("by hand", found["hand_seconds"], "s", note="all events known at once"),
        Figure("ours to by hand", found["ratio"], "", 1.5, at_most=True),
        Figure("of processor time", found["cpu_ratio"], ""),
        Figure("wrong of a sample", found["sample_wrong"], "", 0, at_most=True),
    ]


def run(module: str, *arguments: str) -> str:
    """Return the output of ``python -m module``, run in a process of its own."""
    command = [sys.executable, "-m", module, *arguments]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise RuntimeError(f"`{' '.join(command)}` failed:\n{ran.stdout}{ran.stderr}")
    return ran.stdout


BENCHES: dict[str, tuple[str, Callable[[Path], list[Figure]]]] = {
    "bulk_load": ("Bulk load: 1 million rows of 50 float64, Parquet to served", bulk_load.measure),
    "server": ("Server: 50 float64 features, 1 million entities, 8 connections", server.measure),
    "native": ("pygrpc-native: 50 float64 features, hot rows and random ones, 8 connections", native.measure),
    "workers": ("Workers: two on two cores with the generator, hot rows, 16 connections", workers.measure),
    "telemetry": ("Traces and metrics: requests per second beside none of them, 8 connections", telemetry.measure),
    "profile": ("Profile: the time that Python holds its lock in a loaded server", profile.measure),
    "freshness": ("Freshness: from a write's acknowledgement to its being read elsewhere", freshness.measure),
    "in_process": ("In process: the same view, no server", in_process.measure),
    "memory": ("Memory of a server", memory.measure),
    "grid": ("Rows x features, from a warm and a cold cache, by the load test at 8 connections", grid.measure),
    "overload": ("Overload: requests arrive at multiples of the peak rate", overload.measure),
    "writes": ("Reads while 10,000 rows/s are written, at random instants", writes.measure),
    "windows": ("Windows: 5 features, 1,000 live events per entity, 100 keys; 20,000 events/s", windows.measure),
    "pieces": ("Pieces: median of each", pieces),
    "transform": ("A transform, in process: what it adds to a request", transform.measure),
    "offline_join": ("Training join: 10 million rows, 1 million labels", temporal_join),
    "offline_windows": ("Training windows: 10 million events, 1 million labels, 7 days rolling", window_join),
}
PROJECT = ("bulk_load", "server", "native", "workers", "profile", "in_process", "memory", "overload", "writes")
"""Those that use the project of a million entities."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHES)}; all by default")
    parser.add_argument("--folder", type=Path, help="keep the generated project here, and use it again")
    parser.add_argument("--show", action="store_true", help="print what each benchmark measured last, and stop")
    options = parser.parse_args()
    if options.show:
        report.show_kept()
        return
    names = options.names or list(BENCHES)
    if unknown := set(names) - set(BENCHES):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(BENCHES)}")
    with tempfile.TemporaryDirectory(prefix="featserve-bench-") as temporary:
        folder = options.folder or Path(temporary)
        for name in names:
            title, measure = BENCHES[name]
            if name in PROJECT:
                prepare(folder, loaded=name != "bulk_load")
            before = report.machine()
            figures = measure(folder)
            machine = report.until_now(before)
            report.show(f"{title}\n  ({report.told_stolen(machine)})", figures)
            report.keep(name, title, figures, machine)
    print(f"\nKept in {report.RESULTS.relative_to(ROOT)}; `python -m bench --show` prints all that is kept")


def prepare(folder: Path, loaded: bool) -> None:
    """Make the project in ``folder`` where it is missing, and load its store if it is to be ``loaded``."""
    if not (folder / "featserve.toml").is_file():
        print(f"Making {project.ENTITIES:,} rows of {project.FEATURES} float64 ...", flush=True)
        project.make(folder)
    if loaded and not (folder / ".featserve" / "store").is_dir():
        project.materialize(folder)


if __name__ == "__main__":
    main()
