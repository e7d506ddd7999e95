"""Leakage: what each feature of a training set would have been, and how well it would have told the label, had its rows
been joined carelessly.

Comes in: a service, labels with what is to be predicted, an offline engine. Goes out: a report, as values, a plot or a
page. There is no second join here: a careless one is the temporal join itself, told less than the truth about when rows
were known, or asked at the end of time. Reads no clock; nothing that serves requests imports it.
"""

from __future__ import annotations

import html
import io
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from featserve.arrow import column_from_arrow, column_to_arrow
from featserve.definitions import FeatureService, FeatureView, Rolling
from featserve.errors import CallerError, InvalidRequest, Violation, hint
from featserve.frames import Frame
from featserve.labels import Labels
from featserve.offline import OfflineEngine, Progress
from featserve.training import labels_of, look_up, served
from featserve.types import Column, Float64, Mask, Type

Floats = npt.NDArray[np.float64]
Int64s = npt.NDArray[np.int64]
Measure = Literal["pearson", "correlation ratio", "n/a"]

END_OF_TIME_US = 2**62
ALL_TIME = Rolling(timedelta(microseconds=2**63 - 1))
"""A window that at the end of time holds whatever has happened in the 146,000 years before 1970 and since."""

PLOTS = (".png", ".html")
MAX_DRAWN = 60
"""The most features in a drawing; a page lists them all."""

# How the drawing marks each join: colours that are told apart by everyone, and shapes for those who print in grey.
JOINS = {
    "latest_value": ("#d55e00", "D"),
    "event_time_only": ("#e69f00", "s"),
    "honest": ("#0072b2", "o"),
}
HEADS = (
    "feature",
    "type",
    "rows changed by event time only",
    "rows changed by latest value",
    "measure",
    "honest",
    "event time only",
    "latest value",
)
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 14px sans-serif; margin: 2em auto; max-width: 70em; }} svg {{ max-width: 100%; height: auto; }}
th, td {{ padding: 0.2em 0.6em; text-align: left; }} .number {{ text-align: right; }}
tr:nth-child(even) {{ background: #f4f4f4; }}
</style></head><body><h1>{title}</h1>
<p>Honest: what could be known at each label's own time. Event time only: rows count from their event time on, though
they were known later. Latest value: each entity's newest row of all, or aggregates of all its events. The last three
columns are the correlation with the label under each of these joins.</p>
{drawn}
<table><tr>{heads}</tr>
{lines}
</table></body></html>
"""


@dataclass(frozen=True, slots=True)
class FeatureLeakage:
    """What careless joins make of one feature.

    ``measure``: how its correlation with the label is taken: "pearson" for numbers, bools and timestamps, from -1 to 1;
    "correlation ratio" for strings and bytes, from 0 to 1; "n/a" for vectors. ``honest``: as it could be known at each
    label's time; None where fewer than two rows have both values, or one of them is constant. ``latest_value``: with
    each entity's newest row of all, or aggregates of all its events, whatever the label's time. ``event_time_only``:
    with ``known_at`` ignored. For these two, ``..._rows`` counts the labels whose value is not the honest one.
    """

    feature: str
    type: str
    measure: Measure
    honest: float | None
    event_time_only: float | None
    event_time_only_rows: int
    latest_value: float | None
    latest_value_rows: int

    @property
    def gained(self) -> float:
        """How much stronger its correlation seems under the worse of the careless joins; 0 where under neither."""
        careless = max(abs(self.event_time_only or 0.0), abs(self.latest_value or 0.0))
        return max(0.0, careless - abs(self.honest or 0.0))


@dataclass(frozen=True, slots=True)
class LeakageReport:
    """The features of a service for a training set of ``rows`` labels, those that careless joins flatter most first."""

    service: str
    label: str
    rows: int
    features: tuple[FeatureLeakage, ...]

    def to_dict(self) -> dict[str, Any]:
        """Return it as JSON can hold it."""
        return asdict(self)

    def plot(self, path: Path | str) -> None:
        """Draw it as a ``.png``, or as an ``.html`` page with the numbers below; it replaces the file as a whole.

        Needs matplotlib, which ``featserve[train]`` brings. Raises CallerError for a path that cannot be written.
        """
        path = Path(path)
        check_plot(path)
        drawn = io.BytesIO()
        _figure(self).savefig(drawn, format="png" if path.suffix == ".png" else "svg", dpi=150)
        data = drawn.getvalue()
        partial = path.with_name(f".{path.name}.partial")
        try:
            partial.write_bytes(data if path.suffix == ".png" else _page(self, data.decode()).encode())
            partial.replace(path)
        except OSError as error:
            raise CallerError(f"{path}: the plot cannot be written: {error}") from None
        finally:
            partial.unlink(missing_ok=True)


def check_plot(path: Path) -> None:
    """Refuse a path that a report cannot be drawn to, before the work is done."""
    if path.suffix not in PLOTS:
        raise CallerError(f"{path}: a plot is a file that ends in {' or '.join(PLOTS)}")


def leakage(
    engine: OfflineEngine,
    service: FeatureService,
    labels: Frame | str | Path,
    time: str,
    label: str,
    *,
    root: Path,
    progress: Progress | None = None,
) -> LeakageReport:
    """Return what careless joins would make of the features of ``service`` for these labels.

    ``labels``, ``time`` and ``root`` are those of ``training.training_frame``; ``label``: the labels' column that is to
    be predicted, a number or a bool, rows with a null or NaN count for no correlation. A value is what would be served:
    rounded, with defaults. Outputs of transforms are computed from what their inputs would be, at the label's own time.
    Raises InvalidRequest, SourceError, TransformError.
    """
    checked = labels_of(service, labels, time)
    target = _target(checked, label)

    def columns(number: int, what: str, views: Iterable[FeatureView], as_of_us: Int64s | None) -> dict[str, Column]:
        slots, _ = look_up(
            engine, service, checked, root=root, views=views, as_of_us=as_of_us, progress=_part(progress, number, what)
        )
        return {name: served(f, slots[name], service.dtype) for name, f, _ in service.fields}

    honest = columns(0, "honest", service.views, None)
    event_time_only = columns(1, "event time only", map(_known_at_once, service.views), None)
    end_of_time = np.full(len(target), END_OF_TIME_US)
    latest_value = columns(2, "latest value", map(_timeless, service.views), end_of_time)
    features = []
    for name, f, _ in service.fields:
        measure, correlate = _measure(f.type)
        told = [correlate(columns_[name], target) for columns_ in (honest, event_time_only, latest_value)]
        rows = [int(differs(honest[name], columns_[name]).sum()) for columns_ in (event_time_only, latest_value)]
        features.append(FeatureLeakage(name, str(f.type), measure, told[0], told[1], rows[0], told[2], rows[1]))
    features.sort(key=lambda found: -found.gained)
    return LeakageReport(service.id, label, len(target), tuple(features))


def _known_at_once(view: FeatureView) -> FeatureView:
    """Return the view as if each of its rows had been known from its event time on."""
    assert view.source is not None  # the honest join has read it
    source = replace(view.source, known_at=None, delay=timedelta(0))
    if view.events is None:
        return replace(view, source=source)
    return replace(view, events=replace(view.events, source=source), source=source)


def _timeless(view: FeatureView) -> FeatureView:
    """Return the view without a ttl, and with windows of all time."""
    return replace(view, ttl=None, aggregates=[replace(a, over=ALL_TIME) for a in view.aggregates])


def _part(progress: Progress | None, number: int, what: str) -> Progress | None:
    """Return what reports one of three joins as a part of all."""
    if progress is None:
        return None
    return lambda step, done, total: progress(f"{what}: {step}", number * total + done, 3 * total)


def _target(labels: Labels, name: str) -> Floats:
    """Return the label as float64, NaN where it is null."""
    names = labels.table.column_names
    if name not in names:
        problem = f"missing column {name!r}{hint(name, names)}"
        raise InvalidRequest(f"labels: {problem}", violations=[Violation(f"labels.{name}", problem)])
    values = labels.table.column(name)
    if pa.types.is_boolean(values.type):
        values = values.cast(pa.int8())
    return _floats(column_from_arrow(Float64, values, f"labels.{name}"))


def differs(first: Column, second: Column) -> Mask:
    """Return bool of shape (n,): where two columns of one type differ in value; NaN is NaN, and a null is no value."""
    if first.offsets is not None:
        both = _codes(first, second)
        return np.asarray(both[: len(first)] != both[len(first) :])
    other = first.values != second.values
    if first.type.floating:
        other &= ~(np.isnan(first.values) & np.isnan(second.values))
    if first.type.vector:
        other = other.any(axis=1)
    valid, also = _valid(first), _valid(second)
    return np.asarray((valid != also) | (other & valid))


def _codes(*columns: Column) -> Int64s:
    """Return the values of string or bytes columns, one after the other, as numbers: -1 for a null."""
    array = pa.chunked_array([column_to_arrow(col) for col in columns]).combine_chunks().dictionary_encode()
    return np.asarray(array.indices.fill_null(-1).to_numpy(zero_copy_only=False), np.int64)


def _valid(col: Column) -> Mask:
    return np.ones(len(col), np.bool_) if col.valid is None else col.valid


def _floats(col: Column) -> Floats:
    """Return a column of numbers as float64, NaN where it is null."""
    return np.where(_valid(col), col.values.astype(np.float64), np.nan)


def _measure(type: Type) -> tuple[Measure, Callable[[Column, Floats], float | None]]:
    if type.variable:
        return "correlation ratio", lambda col, target: correlation_ratio(_codes(col), target)
    if type.vector:
        return "n/a", lambda col, target: None
    return "pearson", lambda col, target: pearson(_floats(col), target)


def pearson(x: Floats, y: Floats) -> float | None:
    """Return Pearson's correlation of the rows where both are finite; None where it is not defined."""
    both = np.isfinite(x) & np.isfinite(y)
    x, y = x[both], y[both]
    if len(x) < 2 or x.min() == x.max() or y.min() == y.max():
        return None
    # In units of the greatest value, the squares of no finite numbers overflow.
    x, y = x / np.abs(x).max(), y / np.abs(y).max()
    x, y = x - x.mean(), y - y.mean()
    scale = np.sqrt((x @ x) * (y @ y))
    return float(np.clip(x @ y / scale, -1.0, 1.0)) if scale > 0 else None


def correlation_ratio(codes: Int64s, y: Floats) -> float | None:
    """Return how much of the variance of ``y`` lies between the categories ``codes`` (-1: none), as a root, 0 to 1.

    With the correction of T. L. Kelley (An unbiased correlation ratio measure, PNAS 21, 1935): without it, as many
    categories as rows would explain everything. None where it is not defined.
    """
    both = (codes >= 0) & np.isfinite(y)
    codes, y = codes[both], y[both]
    counts = np.bincount(codes)
    rows, categories = len(y), np.count_nonzero(counts)
    if categories == rows or y.min() == y.max():
        return None
    y = y / np.abs(y).max()
    y = y - y.mean()
    means = np.bincount(codes, y) / np.maximum(counts, 1)
    within = y - means[codes]
    unexplained = (within @ within) / (rows - categories)
    return math.sqrt(max(0.0, 1.0 - float(unexplained) * (rows - 1) / float(y @ y)))


def _figure(report: LeakageReport) -> Any:
    """Return the matplotlib Figure of a report: left how many values change, right how the label is told by them."""
    from matplotlib.figure import Figure  # not pyplot, which would keep the figure and choose a window for it

    drawn = report.features[:MAX_DRAWN]
    places = np.arange(len(drawn))
    figure = Figure(figsize=(11, 1.9 + 0.3 * len(drawn)), layout="constrained")
    rows, correlations = figure.subplots(1, 2, sharey=True)
    for axes in (rows, correlations):
        axes.grid(axis="x", color="#e4e4e4")
        axes.set_axisbelow(True)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.hlines(places, 0, 1, color="#e4e4e4", linewidth=0.8, transform=axes.get_yaxis_transform(), zorder=0)
    for place, f in enumerate(drawn):
        honest = abs(f.honest or 0.0)
        correlations.hlines(place, honest, honest + f.gained, color="#999999", linewidth=2, zorder=1)
    for join, (colour, marker) in JOINS.items():
        told = [getattr(f, join) for f in drawn]
        style: Any = {"linestyle": "", "marker": marker, "color": colour, "label": join.replace("_", " ")}
        correlations.plot([np.nan if value is None else abs(value) for value in told], places, **style)
        if join != "honest":
            rows.plot([100 * getattr(f, f"{join}_rows") / max(report.rows, 1) for f in drawn], places, **style)
    rows.set_yticks(places, [f.feature for f in drawn], fontsize=9)
    rows.set_ylim(len(drawn) - 0.5, -0.5)
    rows.set_xlim(-2, 102)
    rows.set_xlabel("labels whose value is not the honest one, %")
    correlations.set_xlim(-0.02, 1.02)
    correlations.set_xlabel(f"correlation with {report.label}, without its sign", parse_math=False)
    figure.suptitle(_title(report) + ("" if len(drawn) == len(report.features) else f" (the first {MAX_DRAWN})"))
    figure.legend(*correlations.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def _title(report: LeakageReport) -> str:
    return f"{report.service}: what careless joins would make of {report.rows:,} labels"


def _page(report: LeakageReport, drawn: str) -> str:
    """Return an HTML page that needs nothing else: the drawing, an SVG document, and every number."""

    def cell(value: int | float | str | None) -> str:
        if isinstance(value, str):
            return f"<td>{html.escape(value)}</td>"
        text = "" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:+.3f}"
        return f'<td class="number">{text}</td>'

    lines = []
    for f in report.features:
        cells = (f.feature, f.type, f.event_time_only_rows, f.latest_value_rows, f.measure)
        told = (f.honest, f.event_time_only, f.latest_value)
        lines.append(f"<tr>{''.join(map(cell, (*cells, *told)))}</tr>")
    heads = "".join(f"<th>{head}</th>" for head in HEADS)
    return PAGE.format(
        title=html.escape(_title(report)), drawn=drawn[drawn.index("<svg") :], heads=heads, lines="\n".join(lines)
    )
