"""``featserve train`` and ``featserve leakage``: training frames from label files, and what careless joins would do.

Comes in: a project's applied definitions and a file of labels. Both read the batch sources, and no store.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import click
import pyarrow.parquet as pq
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from featserve import training
from featserve.cli.show import STDERR, counted, facts, show, show_json, size, table
from featserve.cli.target import Verb
from featserve.cli.verbs import applied, as_json, project, settings
from featserve.errors import CallerError, DefinitionError
from featserve.leakage import LeakageReport, check_plot
from featserve.leakage import leakage as report_leakage
from featserve.offline import Engine, open_engine
from featserve.offline import Progress as Steps
from featserve.offline.memory import mebibytes

file = click.Path(exists=True, dir_okay=False, path_type=Path)
new_file = click.Path(dir_okay=False, path_type=Path)


def memory(text: str) -> str:
    """Return a size as every engine takes it."""
    try:
        mebibytes(text)
    except DefinitionError as error:
        raise click.BadParameter(str(error)) from None
    return text


def from_labels(verb: Verb) -> Verb:
    """Add what both verbs take: a service, labels, their time, and the engine that joins them."""
    parameters = (
        click.argument("service"),
        click.option("--labels", type=file, required=True, help="The labels: a .parquet or .csv file."),
        click.option("--time", "time_column", metavar="COLUMN", required=True, help="The labels' column of times."),
        click.option(
            "--engine", type=click.Choice(["duckdb", "spark"]), default="duckdb", show_default=True, help="What joins."
        ),
        click.option(
            "--memory-limit", type=memory, metavar="SIZE", help="What it may hold in memory, as in 4G or 500M."
        ),
        project,
    )
    for parameter in reversed(parameters):
        verb = parameter(verb)
    return verb


@click.command()
@from_labels
@click.option("--out", type=new_file, metavar="FILE.parquet", required=True, help="Where to write the frame.")
@click.option("--event-times", is_flag=True, help="Add <view>.event_time, null where there is no row.")
@click.option("--statuses", is_flag=True, help="Add <feature>.status, why each value is what it is.")
def train(
    service: str,
    labels: Path,
    time_column: str,
    out: Path,
    engine: Engine,
    memory_limit: str | None,
    folder: Path,
    event_times: bool,
    statuses: bool,
) -> None:
    """Write a training frame for a file of labels.

    Each label gets the features of SERVICE as they could be known at the label's own time.

    SERVICE is name (its promoted version), name@version or name#hash. LABELS has its key columns, its request columns,
    and a column of times, which are UTC where they carry no offset.

    The frame has a row for each label, in the labels' order: the labels' columns, then the features, of the names,
    order and types that are served. It takes the place of FILE.parquet as a whole.

    \b
    Example:
      featserve train churn --labels churned.csv --time asked_at --out train.parquet
    """
    if out.suffix != ".parquet":
        raise click.BadParameter(f"{out}: a training frame is a file that ends in .parquet", param_hint="--out")
    if out.exists() and out.samefile(labels):
        raise click.BadParameter(f"{out} holds the labels", param_hint="--out")
    started = time.monotonic()
    definition, root = applied(folder).service(service), settings(folder).folder
    with closing(open_engine(engine, memory_limit=memory_limit)) as opened, _progress() as steps:
        frame = training.training_frame(
            opened, definition, labels, time_column,
            root=root, event_times=event_times, statuses=statuses, progress=steps,
        )  # fmt: skip
    _write(frame, out)
    show_frame(frame, len(definition.fields), out, time.monotonic() - started)


def _write(frame: Any, out: Path) -> None:
    """Write a frame to a file of that name, or leave what was there."""
    partial = out.with_name(f".{out.name}.partial")
    try:
        pq.write_table(frame, partial, compression="zstd")
        partial.replace(out)
    except OSError as error:
        raise CallerError(f"{out}: the training frame cannot be written: {error}") from None
    finally:
        partial.unlink(missing_ok=True)


def show_frame(frame: Any, features: int, out: Path, seconds: float) -> None:
    """Print what was written, and how many labels see nothing of each view."""
    rows = frame.num_rows
    origin = json.loads(frame.schema.metadata[training.METADATA.encode()])
    show(
        facts(
            [
                ("service", f"{origin['service']}#{origin['hash'][:12]}"),
                ("rows", f"{rows:,}, each with {counted(features, 'feature')}"),
                ("seconds", f"{seconds:.1f}"),
                ("file", f"{out}, {size(out.stat().st_size)}"),
            ]
        ),
        "",
    )
    shares = ["missing", "not found", "expired"]
    made = table("view", *shares, right=shares)
    for view, counts in origin["views"].items():
        lost = (counts["NOT_FOUND"] + counts["EXPIRED"], counts["NOT_FOUND"], counts["EXPIRED"])
        made.add_row(view, *(f"{100 * count / max(rows, 1):.2f} %" for count in lost))
    show(made)


@click.command()
@from_labels
@click.option("--label", metavar="COLUMN", required=True, help="The labels' column that is to be predicted.")
@click.option("--plot", type=new_file, metavar="FILE", help="Draw the report, too: a .png or .html file.")
@as_json
def leakage(
    service: str,
    labels: Path,
    time_column: str,
    label: str,
    plot: Path | None,
    engine: Engine,
    memory_limit: str | None,
    folder: Path,
    as_json: bool,
) -> None:
    """Show what careless joins would do to a training set.

    For each feature: its correlation with the label as it could honestly be known at the label's time; what that would
    seem to be if rows were taken to be known from their event time on ("event time only"), or if each entity's newest
    row of all were taken ("latest value"); and how many labels would have another value then. Those that are flattered
    most come first.

    Correlation is Pearson's for numbers, bools and timestamps, and for strings and bytes the correlation ratio,
    corrected for the number of categories ("ratio"); vectors have none.

    \b
    Example:
      featserve leakage churn --labels churned.csv --time asked_at --label churned --plot leakage.html
    """
    if plot is not None:
        check_plot(plot)
    definition, root = applied(folder).service(service), settings(folder).folder
    with closing(open_engine(engine, memory_limit=memory_limit)) as opened, _progress() as steps:
        report = report_leakage(opened, definition, labels, time_column, label, root=root, progress=steps)
    if plot is not None:
        report.plot(plot)
    if as_json:
        show_json(report.to_dict())
        return
    show_report(report)
    if plot is not None:
        show("", f"Plot: {plot}")


def show_report(report: LeakageReport) -> None:
    """Print a line for each feature."""
    show(
        facts(
            [
                ("service", report.service),
                ("label", f"{report.label} of {counted(report.rows, 'row')}"),
                ("honest", "correlation with the label, of what was known at the label's time"),
                ("event time only", "the same, as if rows were known from their event time on"),
                ("latest value", "the same, with each entity's newest row of all"),
                ("rows", "how many labels have another value than the honest one then"),
            ]
        ),
        "",
    )
    numbers = ["honest", "event\ntime\nonly", "latest\nvalue", "rows:\nevent\ntime", "rows:\nlatest\nvalue"]
    made = table("feature", "measure", *numbers, right=numbers)
    for f in report.features:
        told = ("" if value is None else f"{value:.3f}" for value in (f.honest, f.event_time_only, f.latest_value))
        measure = f.measure.removeprefix("correlation ")
        made.add_row(f.feature, measure, *told, f"{f.event_time_only_rows:,}", f"{f.latest_value_rows:,}")
    show(made)


@contextmanager
def _progress() -> Iterator[Steps]:
    """Yield what moves a progress bar on standard error; without a terminal there is none."""
    columns = (
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=STDERR, disable=not STDERR.is_terminal, transient=True) as bars:
        task = bars.add_task("", total=None)
        yield lambda what, done, total: bars.update(task, description=what, completed=done, total=total)
