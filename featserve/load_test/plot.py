"""Draws a result: latency against load, a line for each batch size and quantile that has samples enough."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from featserve.errors import CallerError
from featserve.load_test.histogram import QUANTILES
from featserve.load_test.result import Point, Result

SUFFIXES = (".png", ".svg")
DRAWN = {"p50": "-", "p99": "--", "p99.9": ":"}


def check_plot(path: Path) -> None:
    """Refuse a path that a result cannot be drawn to, or an installation that cannot draw, before the test is run."""
    if path.suffix not in SUFFIXES:
        raise CallerError(f"{path}: a plot is a file that ends in {' or '.join(SUFFIXES)}")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise CallerError(f"{path}: a plot needs matplotlib: pip install 'featserve[train]'") from None


def plot(result: Result, path: Path) -> None:
    """Draw latency against the answers a second; raises CallerError for a path that cannot be written."""
    check_plot(path)
    try:
        figure_of(result).savefig(path, dpi=150)
    except OSError as error:
        raise CallerError(f"{path}: the plot cannot be written: {error}") from None


def figure_of(result: Result) -> Any:
    """Return the matplotlib Figure of a result; a point that could not keep up with its rate is hollow."""
    from matplotlib.figure import Figure  # not pyplot, which would keep the figure and choose a window for it

    figure = Figure(figsize=(9, 5.5), layout="constrained")
    axes = figure.subplots()
    for number, batch in enumerate(sorted({point.load.batch for point in result.points})):
        points = [point for point in result.points if point.load.batch == batch]
        for name, style in DRAWN.items():
            drawn = _drawn(points, QUANTILES[name])
            if not drawn:
                continue
            label = f"{name}, {batch:,} {'row' if batch == 1 else 'rows'} a request"
            colour = f"C{number}"
            axes.plot([d[0] for d in drawn], [d[1] for d in drawn], style, color=colour, label=label)
            for rate, latency, kept in drawn:
                axes.plot(rate, latency, "o", color=colour, markersize=5, fillstyle="full" if kept else "none")
    axes.set_yscale("log")
    axes.set_xlim(left=0)
    axes.set_xlabel("answers a second")
    axes.set_ylabel("latency, µs")
    axes.grid(color="#e4e4e4", which="both", linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(result.service, loc="left")
    if axes.lines:
        axes.legend(frameon=False)
    return figure


def _drawn(points: list[Point], quantile: float) -> list[tuple[float, float, bool]]:
    """Return (answers a second, microseconds, whether it kept up) where there are samples for a quantile."""
    found: list[tuple[float, float, bool]] = []
    for total in sorted((point.total() for point in points), key=lambda total: total.arrived):
        told = total.latency.told_ns(quantile)
        if told is not None:
            found.append((total.answered / total.seconds, told / 1e3, total.kept_up))
    return found
