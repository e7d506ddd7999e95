"""``make bench-peers``: featserve beside Feast, Redis and a bare gRPC handler, in one run; prints, plots, and a page.

What cannot be installed or started is named with its error, and the others are measured; the exit code is then 1.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from bench import project, report
from bench.__main__ import prepare
from bench.peers import environments, page, rounds, rows, systems, targets
from bench.peers.environments import NotThere
from bench.peers.rounds import Cells, Length
from bench.peers.systems import System

ROUNDS, CALLS = 8, 10_000
"""All rounds together have the calls that it takes to tell a p99, but for the slowest systems."""
BRIEF = Length(rounds=2, calls=200, seconds=0.3, patience_s=1.5)
FEAST_ENTITIES = 5_000
"""It writes a few hundred to a few thousand a second, and how many there are changes nothing for Redis."""
RESULTS = report.RESULTS.with_name("peers.json")
CHECKED = [0, 1, 17, 2_345, 4_999]
LOGGED: set[str] = set()
PINNED = ("feast", "redis", "hiredis", "grpcio")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.peers", description=__doc__)
    parser.add_argument("--brief", action="store_true", help="fewer calls; the page goes to bench/results")
    parser.add_argument("--folder", type=Path, help="keep the generated project here, and use it again")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of which each then has more calls; default: 8")
    options = parser.parse_args()
    length = BRIEF if options.brief else Length(options.rounds, -(-CALLS // options.rounds), 0.7, 4.0)
    with tempfile.TemporaryDirectory(prefix="featserve-peers-") as temporary, ExitStack() as stack:
        machine = report.machine()
        folder = options.folder or Path(temporary) / "project"
        prepare(folder, loaded=True)
        values = rows.read(folder)
        started, missing = start(stack, folder, Path(temporary), values)
        for system in list(started):
            if (wrong := differs(system, values)) is not None:
                missing[system.name] = wrong
                started.remove(system)
        cells, ended = rounds.measure(started, length, show_progress)
        show_progress("")
        missing |= ended
        if not cells:
            raise SystemExit(f"nothing could be measured: {missing}")
    told: dict[str, Any] = {"machine": report.until_now(machine), "versions": versions(), "missing": missing}
    told |= {"entities": project.ENTITIES, "feast_entities": FEAST_ENTITIES}
    found = targets.figures(cells)
    show(cells, found, missing)
    figures = {"/".join(map(str, key)): cell.to_json() for key, cell in cells.items()}
    report.write(told | {"cells": figures, "targets": found}, RESULTS)
    written = page.write(RESULTS.parent if options.brief else report.ROOT / "docs", cells, found, told, length)
    print(f"\nWritten to {written.relative_to(report.ROOT)} and {RESULTS.relative_to(report.ROOT)}")
    return bool(missing)


def start(stack: ExitStack, folder: Path, temporary: Path, values: Any) -> tuple[list[System], dict[str, str]]:
    """Start what can be; return that, and for each of the others why not."""
    started: list[System] = []
    missing: dict[str, str] = {}
    for name, begin in begun(stack, folder, temporary, values):
        show_progress(f"starting {name}")
        try:
            started.append(begin())
        except NotThere as error:
            missing[name] = str(error)
    show_progress("")
    return started, missing


def begun(stack: ExitStack, folder: Path, temporary: Path, values: Any) -> Iterator[tuple[str, Callable[[], System]]]:
    """Yield what starts each system. What several need is made by the first; where it fails, it fails them all."""
    kept: dict[str, Any] = {}

    def once(name: str, make: Callable[[], Any]) -> Any:
        if name not in kept:
            kept[name] = make()
        return kept[name]

    def redis_port() -> int:
        def make() -> int:
            port = systems.start_redis(stack, environments.redis_server(), temporary)
            rows.fill_redis(port, values, show_progress)
            return port

        return int(once("redis", make))

    def feast(begin: Callable[..., System]) -> System:
        python, repository = environments.python_of("feast"), temporary / "feast"
        show_progress(f"Feast: writing {FEAST_ENTITIES:,} rows")
        once("feast", lambda: rows.fill_feast(python, repository, values[:FEAST_ENTITIES], redis_port()))
        return begin(stack, python, repository, FEAST_ENTITIES)

    def redis(name: str, environment: str, kind: str) -> System:
        return systems.redis(stack, name, environments.python_of(environment), redis_port(), kind)

    yield "featserve, in process", partial(systems.in_process, stack, folder)
    for transport in ("native", "grpcio"):
        yield f"featserve, {transport}", partial(systems.served, stack, folder, transport)
    yield "bare handler, grpcio", partial(systems.bare, stack, folder)
    for name, environment, kind in (
        (targets.BLOBS, "redis", "blobs"),
        (targets.BLOBS_HIREDIS, "redis-hiredis", "blobs"),
        ("Redis, hashes (HMGET), hiredis", "redis-hiredis", "hashes"),
    ):
        yield name, partial(redis, name, environment, kind)
    yield "Feast, gRPC", partial(feast, systems.feast_grpc)
    yield "Feast, HTTP", partial(feast, systems.feast_http)


def differs(system: System, values: Any) -> str | None:
    """Say where a system answers other values than were written."""
    try:
        answer = system.client.tell({"check": CHECKED})
    except NotThere as error:
        return str(error)
    right = np.array_equal(np.array(answer, np.float32), values[CHECKED])
    return None if right else "it answers other values than were written"


def versions() -> dict[str, str]:
    """Return the versions of the peers' packages, as they are pinned, and of the redis-server that is installed."""
    lines = [
        line
        for name in ("feast", "redis-hiredis")
        for line in (environments.REQUIREMENTS / f"{name}.txt").read_text().splitlines()
    ]
    pinned = dict(line.split(";")[0].strip().split("==") for line in lines if "==" in line and line[0] not in " #")
    found = {name.partition("[")[0]: version for name, version in pinned.items() if name.partition("[")[0] in PINNED}
    server = environments.redis_server_version()
    named = {name if name != "redis" else "redis-py": version for name, version in found.items()}
    return named if server is None else named | {"redis-server": server}


def show(cells: Cells, found: list[report.Figure], missing: dict[str, str]) -> None:
    """Print what was measured."""
    for connections, title in ((1, "Latency of one call from Python"), (8, "Answers a second at eight connections")):
        figures = []
        for (name, keys, at_once), cell in cells.items():
            if at_once == connections:
                note = "" if cell.tail is None else f"{cell.tail[0]} {report.number(cell.tail[1])} us"
                value, unit = (cell.p50_us, "us p50") if connections == 1 else (cell.rate, "/s")
                figures.append(report.Figure(f"{name}, {keys} keys", value, unit, note=note))
        report.show(title, figures)
    report.show("Ratios", found)
    for name, why in missing.items():
        print(f"\nNot measured: {name}: {why}", file=sys.stderr)


def show_progress(text: str) -> None:
    """Show what is under way, on a line that is written over; in a log, a line for each round."""
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns - 1
        print(f"\r\x1b[K{text[:width]}", end="", file=sys.stderr, flush=True)
    elif (part := text.partition(":")[0].partition(", about")[0]) and part not in LOGGED:
        LOGGED.add(part)
        print(part, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
