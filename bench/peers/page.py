"""The page in the documentation: tables, plots, and how to get them again. All its numbers come from one run."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure as Drawing

from bench.peers.rounds import KEYS, Cell, Cells, Length
from bench.report import ROOT, Figure, commit_of, number, told_stolen

PLOT = "benchmarks.svg"
METHOD = """\
Every system holds the same rows, 50 features of an entity, and is asked by a client on the same machine. Systems take
turns in short rounds, so that what else the machine does meets all alike. Redis has all rows in memory from the start;
featserve and the bare handler are asked for every entity once before the first round, so that the rows are in their
caches, of the size that they have by default.

Latency is that of one call after the other from Python, through the system's own client, until the caller has the
values; for Feast that is its parsed message. Entities are drawn evenly at random for each call.

Throughput is that of eight connections, each with one request under way. Every server that speaks gRPC or HTTP is
loaded by h2load, as a client in Python would be slower than what it measures. It repeats one request, drawn anew for
each round, so there all systems are asked for few rows. Redis is asked by eight threads of redis-py, each time for
other rows, so its figure includes its client. It is redis-py as `pip install redis` brings it, and with hiredis, its
parser in C, where that is said.

Feast runs as `feast listen` and `feast serve` start it, one process each, over Redis, and holds {feast_entities:,}
entities, as its API writes at most a few thousand rows a second; the others hold {entities:,}. Features are float32 in
Feast and in Redis, where they are packed; featserve stores float64 and answers float32, from one worker. The bare
handler is a gRPC method that reads the same rows from RocksDB, whose row cache has as much memory as that of featserve,
and checks nothing."""

RATIOS = """\
Ratios are medians over the rounds; those of a p99 are of all calls, and to Feast's p90 or p50 where it answered too
few to tell its p99, which is no less."""

AGAIN = """\
It installs each peer in an environment of its own in `.peers/`, of the versions that `bench/peers/requirements/` pins,
and writes this page and `bench/results/peers.json`, in a quarter of an hour. With `ARGS=--brief` it takes a few
minutes, tells fewer quantiles, and leaves this page alone."""


def write(folder: Path, cells: Cells, targets: list[Figure], told: dict[str, Any], length: Length) -> Path:
    """Write benchmarks.md and its plot to ``folder``; return its path. ``told``: the machine, and what is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn(cells).savefig(folder / PLOT, metadata={"Date": None})
    page = folder / "benchmarks.md"
    page.write_text("\n".join(_lines(cells, targets, told, length)).rstrip() + "\n", encoding="utf-8")
    return page


def _lines(cells: Cells, targets: list[Figure], told: dict[str, Any], length: Length) -> Iterator[str]:
    machine = told["machine"]
    names = list(dict.fromkeys(name for name, _, _ in cells))
    yield from (
        "# featserve beside its peers",
        "",
        "<!-- Written by `make bench-peers`: edit bench/peers/page.py. -->",
        "",
    )
    yield from _filled(METHOD.format(**told))
    versions = ", ".join(f"{name} {at}" for name, at in told["versions"].items())
    yield from _filled(
        f"Measured at {machine['at']}, commit {commit_of(machine)}, on {machine['cpus']} CPUs, {machine['cpu']}, "
        f"with Python {machine['python']}, {versions}, in {length.rounds} rounds. "
        f"The load average before was {machine['load_average'][0]:.1f}"
        f"{', so others were at work: trust no figure by itself' if machine['load_average'][0] > 1 else ''}; "
        f"{told_stolen(machine)} meanwhile. "
        "Absolute times are this machine's; ratios carry further."
    )
    for name, why in told["missing"].items():
        yield from _filled(f"**Not measured: {name}.** {why.replace(f'{ROOT}/', '').strip().splitlines()[0]}")
    yield from ("![p50 and throughput of all systems](benchmarks.svg)", "", "## Latency of one call, µs", "")
    yield from _table(cells, names, 1, _latency)
    yield from ("", "p50 and p99, or the p90 where fewer than 100 calls lie beyond the p99.", "")
    yield from ("## Answers a second at eight connections", "")
    yield from _table(cells, names, 8, _throughput)
    yield from ("", "In brackets the p99 (or p90) of a call in µs, eight at once.", "", "## Ratios", "")
    yield from ("| | measured | target | | of |", "|---|--:|--:|---|---|")
    for f in targets:
        assert f.target is not None
        bound = f"{'at most' if f.at_most else 'at least'} {number(f.target)}"
        yield f"| {f.name} | {number(f.value)} | {bound} | {f.verdict} | {f.note.replace(' us', ' µs')} |"
    yield from ("", *_filled(RATIOS), "## Again", "")
    yield from ("```", "apt-get install redis-server nghttp2-client", "make bench-peers", "```", "")
    yield from _filled(AGAIN)


def _filled(text: str) -> Iterator[str]:
    """Yield the lines of paragraphs, and an empty one after each."""
    for paragraph in text.split("\n\n"):
        yield from (textwrap.fill(paragraph, 120, break_long_words=False, break_on_hyphens=False), "")


def _table(cells: Cells, names: list[str], connections: int, cell_of: Any) -> Iterator[str]:
    yield f"| | {' | '.join(f'{keys} key' if keys == 1 else f'{keys} keys' for keys in KEYS)} |"
    yield f"|---|{'--:|' * len(KEYS)}"
    for name in names:
        found = [cells.get((name, keys, connections)) for keys in KEYS]
        if any(found):
            yield f"| {name} | {' | '.join('' if cell is None else cell_of(cell) for cell in found)} |"


def _latency(cell: Cell) -> str:
    return f"{number(cell.p50_us)} / {_tail(cell)}"


def _throughput(cell: Cell) -> str:
    return f"{number(cell.rate)} ({_tail(cell)})"


def _tail(cell: Cell) -> str:
    if cell.tail is None:
        return "—"
    name, told = cell.tail
    return number(told) if name == "p99" else f"{name} {number(told)}"


def drawn(cells: Cells) -> Drawing:
    """Return two plots over the number of keys: the p50 of one call, and answers a second at eight connections."""
    figure = Drawing(figsize=(11, 4.8), layout="constrained")
    latency, throughput = figure.subplots(1, 2)
    for at, name in enumerate(dict.fromkeys(name for name, _, _ in cells)):
        for axes, connections in ((latency, 1), (throughput, 8)):
            found = [(keys, cells[name, keys, connections]) for keys in KEYS if (name, keys, connections) in cells]
            values = [cell.p50_us if connections == 1 else cell.rate for _, cell in found]
            if found:
                axes.plot([keys for keys, _ in found], values, "o-", color=f"C{at}", label=name, markersize=4)
    for axes, title in ((latency, "p50 of one call, µs"), (throughput, "answers a second at eight connections")):
        axes.set(xscale="log", yscale="log", xlabel="keys of a request")
        axes.set_xticks(KEYS, [str(keys) for keys in KEYS])
        axes.set_title(title, loc="left")
        axes.grid(color="#e4e4e4", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.legend(*latency.get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure
