"""What was measured: figures beside their targets, as a table and as JSON, and the machine they were measured on."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from math import isnan, nan
from pathlib import Path
from typing import Any

import psutil

from featserve.load_test.histogram import Histogram, samples_needed

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "latest.json"
PACKAGES = ("featserve", "grpcio", "numpy", "protobuf", "pyarrow", "rocksdict", "uvloop", "duckdb")


@dataclass(frozen=True, slots=True)
class Figure:
    """One figure. ``target``: the least it should be, or with ``at_most`` the most; None where nothing is promised."""

    name: str
    value: float
    unit: str
    target: float | None = None
    at_most: bool = False
    note: str = ""

    @property
    def verdict(self) -> str:
        """PASS, MISS, or nothing where there is no target."""
        if self.target is None:
            return ""
        return "PASS" if (self.value <= self.target if self.at_most else self.value >= self.target) else "MISS"


def show(title: str, figures: Sequence[Figure]) -> None:
    """Print figures as a table."""
    rows = [("", "measured", "target", "", "")]
    for f in figures:
        target = "" if f.target is None else f"{'<=' if f.at_most else '>='} {number(f.target)}"
        value = "not told" if isnan(f.value) else f"{number(f.value)} {f.unit}"
        rows.append((f.name, value, target, f.verdict, f.note))
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    print(f"\n{title}")
    for name, value, *rest in rows:
        cells = [
            name.ljust(widths[0]),
            value.rjust(widths[1]),
            *(c.ljust(w) for c, w in zip(rest, widths[2:], strict=False)),
        ]
        print("  " + "  ".join([*cells, rest[2]]).rstrip())


def number(value: float) -> str:
    """Return a number with three digits that say something, or all that stand before the point."""
    digits = next((digits for digits, least in enumerate((100, 10, 1)) if abs(value) >= least), 3 if value else 0)
    return f"{value:,.{digits}f}"


def told_p99(p99: float, samples: int) -> float:
    """Return a p99, or NaN, which reads "not told" and meets no target, where it is of too few samples."""
    return p99 if samples >= samples_needed(0.99) else nan


def p99_us(latency: Histogram) -> float:
    """Return the p99 in microseconds, NaN as ``told_p99`` does."""
    told_ns = latency.told_ns(0.99)
    return nan if told_ns is None else told_ns / 1e3


def machine() -> dict[str, Any]:
    """Return what the figures depend on beside the code."""
    cpus = [line for line in _read("/proc/cpuinfo").splitlines() if line.startswith("model name")]
    memory = _read("/proc/meminfo").splitlines()
    return {
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "changed": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "cpu": cpus[0].partition(":")[2].strip() if cpus else platform.processor(),
        "cpus": os.cpu_count(),
        "memory": memory[0].partition(":")[2].strip() if memory else "",
        "system": platform.platform(),
        "python": platform.python_version(),
        "load_average": os.getloadavg(),
        "processors_s": _processors_s(),
        "packages": {name: version(name) for name in PACKAGES},
    }


def until_now(machine: dict[str, Any]) -> dict[str, Any]:
    """Return ``machine`` of before, with the part of its processors that was ``stolen`` since: that its host gave to
    others, which no load average tells.
    """
    (stolen_before, all_before), (stolen, all_) = machine["processors_s"], _processors_s()
    return machine | {"stolen": (stolen - stolen_before) / max(all_ - all_before, 1e-9)}


def told_stolen(machine: dict[str, Any]) -> str:
    """Return how much of the processors the machine's host kept for others while something was measured."""
    if "stolen" not in machine:
        return "what the machine's host stole is not known"  # of a file of before
    return f"{100 * machine['stolen']:.2g} % of the processors stolen by the machine's host"


def _processors_s() -> tuple[float, float]:
    """Return the seconds of processor time that were stolen since the machine was started, and those of all."""
    times = psutil.cpu_times()._asdict()
    guests = times.get("guest", 0.0) + times.get("guest_nice", 0.0)  # which count among user and nice, too
    return times.get("steal", 0.0), sum(times.values()) - guests


def commit_of(machine: dict[str, Any]) -> str:
    """Return the commit that was measured, in nine digits, and whether files had been changed since it."""
    return f"{machine['commit'][:9] or 'unknown'}{', with changes' if machine.get('changed') else ''}"


def _git(*arguments: str) -> str:
    ran = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    return ran.stdout.strip()


def _read(path: str) -> str:
    return Path(path).read_text(encoding="utf-8") if Path(path).is_file() else ""


def write(measured: Any, path: Path) -> None:
    """Write what was measured as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(measured, indent=2, default=asdict_of) + "\n", encoding="utf-8")


def keep(name: str, title: str, figures: Sequence[Figure], machine: dict[str, Any], path: Path = RESULTS) -> None:
    """Keep what a benchmark measured on a machine, in the place of what it measured before."""
    kept = {entry["name"]: entry for entry in kept_results(path)}
    kept[name] = {"name": name, "title": title, "machine": machine, "figures": figures}
    write(list(kept.values()), path)


def kept_results(path: Path = RESULTS) -> list[dict[str, Any]]:
    """Return what each benchmark measured last."""
    return list(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else []


def show_kept(path: Path = RESULTS) -> None:
    """Print what each benchmark measured last, and when, of which commit, on which machine, and how busy that was."""
    for entry in kept_results(path):
        machine = entry["machine"]
        told = (
            f"{machine['at'][:16]} UTC, commit {commit_of(machine)}; {machine['cpus']} CPUs, {machine['cpu']}, "
            f"{machine['system']}, Python {machine['python']}; load average {machine['load_average'][0]:.1f}, "
            f"{told_stolen(machine)}"
        )
        figures = [{key: value for key, value in figure.items() if key != "verdict"} for figure in entry["figures"]]
        show(f"{entry['title']}\n  ({told})", [Figure(**figure) for figure in figures])


def asdict_of(value: Any) -> Any:
    """Return a figure as JSON holds it."""
    return asdict(value) | {"verdict": value.verdict}
