"""``featserve load-test``: measure a running server, and compare two results.

Comes in: a service, its key columns and how hard to ask. Goes out: a table of latencies, and files on request.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import click
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from featserve.cli.columns import parse_values, read_file
from featserve.cli.show import STDERR, counted, facts, note, show, show_json, table
from featserve.cli.target import Target, asks
from featserve.cli.verbs import as_json
from featserve.embedded import clock_us
from featserve.errors import InvalidRequest, ServingError, hint
from featserve.frames import columns_of
from featserve.load_test import (
    Comparison,
    Listed,
    Load,
    LoadTest,
    Range,
    Reads,
    Result,
    Round,
    Writes,
    compare,
    describe_view,
    run,
)
from featserve.load_test.histogram import QUANTILES, samples_needed
from featserve.load_test.plot import check_plot, plot
from featserve.load_test.run import WRITTEN_AT_ONCE, check_loopback
from featserve.load_test.source import Axis
from featserve.schema import ServiceSchema
from featserve.types import column

existing = click.Path(exists=True, dir_okay=False, path_type=Path)
new_file = click.Path(dir_okay=False, path_type=Path)
BUSY = 0.5
"""The load average for each CPU from which a machine is not the test's own."""
LAGGING = 0.2
"""The part of a p99 that the load generator's own lateness may be before the table says so."""


class Numbers(click.ParamType[Any]):
    """Numbers over 0, separated by commas."""

    name = "numbers"

    def convert(
        self, value: str | tuple[float, ...], param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[float, ...]:
        if isinstance(value, tuple):
            return value
        try:
            return tuple(float(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r} is not numbers as in 1000,2000", param, ctx)


class Whole(Numbers):
    """Whole numbers over 0, separated by commas."""

    def convert(
        self, value: str | tuple[float, ...], param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        numbers = super().convert(value, param, ctx)
        if any(number != int(number) for number in numbers):
            self.fail(f"{value!r} is not whole numbers as in 1,10,100", param, ctx)
        return tuple(map(int, numbers))


class LoadTests(click.Group):
    """A group whose first word, where it is none of its verbs, is the service of ``run``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help"):
            args = ["run", *args]
        return super().parse_args(ctx, args)


@click.group("load-test", cls=LoadTests)
def load_test() -> None:
    """Measure how fast a running server answers.

    \b
    Examples:
      featserve load-test churn customer_id=1..100000 --server 127.0.0.1:7070
      featserve load-test compare before.json after.json

    `featserve load-test run --help` tells all options of a measurement; the word run may be left out.
    """


@load_test.command("run")
@click.argument("service")
@click.argument("keys", nargs=-1, metavar="[KEY=VALUES]...")
@asks("--server", "The server to load.", required=True)
@click.option("--keys-file", type=existing, help="Draw rows of key (and request) columns from this file.")
@click.option(
    "--zipf", type=float, default=0.0, metavar="S", help="Draw keys by Zipf's law, as in 0.99; default: evenly."
)
@click.option("--batch", type=Whole(), default="1", show_default=True, metavar="N,N", help="Rows of a request.")
@click.option("--rate", type=Numbers(), metavar="N,N", help="Requests/s to offer (open loop).")
@click.option("--connections", type=Whole(), default="8", show_default=True, metavar="N,N", help="Connections.")
@click.option("--processes", type=int, default=1, show_default=True, help="Processes that send.")
@click.option("--rounds", type=int, default=10, show_default=True, help="Rounds of each load.")
@click.option("--round", "round_s", type=float, default=3.0, show_default=True, metavar="S", help="Seconds of a round.")
@click.option("--warm-up", "warm_up_s", type=float, default=2.0, show_default=True, metavar="S", help="Seconds before.")
@click.option("--timeout", "timeout_s", type=float, default=5.0, show_default=True, metavar="S", help="Deadline.")
@click.option("--write", "view", metavar="VIEW", help="Write rows of this view meanwhile; they replace what is stored.")
@click.option("--write-file", type=existing, help="The rows to write, over and over: the view's columns.")
@click.option("--write-rate", type=float, default=1_000.0, show_default=True, metavar="N", help="Rows/s to write.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of all that is random.")
@click.option("--allow-remote", is_flag=True, help="Load a server on another machine.")
@click.option("--plot", "plotted", type=new_file, metavar="FILE", help="Draw latency against load: .png or .svg.")
@click.option("--json", "saved", type=new_file, metavar="FILE", help="Write the result, to compare it with others.")
def run_(
    service: str,
    keys: tuple[str, ...],
    target: Target,
    keys_file: Path | None,
    zipf: float,
    batch: tuple[int, ...],
    rate: tuple[float, ...] | None,
    connections: tuple[int, ...],
    view: str | None,
    write_file: Path | None,
    write_rate: float,
    plotted: Path | None,
    saved: Path | None,
    **options: float,
) -> None:
    """Load a server, and show how long its answers took.

    With --rate, requests arrive at random instants at that rate, whether or not those before them were answered, and
    their latency counts from the instant at which they should have started: a stall is not hidden. Without it, each
    connection sends its next request when the last one was answered, which finds the greatest throughput.

    KEY=VALUES is a range of whole numbers, 1..100000, or a list, a,b,c; each column is drawn on its own. Rows of
    --keys-file stay together.

    Several batches, rates or connections are measured one after the other. A quantile is told from as many samples as
    leave 100 beyond it: 10,000 for a p99.

    \b
    Examples:
      featserve load-test churn customer_id=1..100000 --server 127.0.0.1:7070 --batch 1,10,100
      featserve load-test churn --keys-file customers.csv --zipf 0.99 --server 127.0.0.1:7070 --rate 500,1000,2000 \\
        --plot load.png --json load.json
    """
    if (view is None) != (write_file is None):
        raise click.UsageError("--write VIEW and --write-file FILE go together.")
    if plotted is not None:
        check_plot(plotted)
    if not options["allow_remote"]:
        check_loopback(target.address)
    with target.connect() as client:
        schema = client.describe(service)
    reads = Reads(service, tuple(schema.keys), axes_of(schema, keys, keys_file), zipf)
    writes = None
    if view is not None and write_file is not None:
        expected = describe_view(target.address, view, target.tls)
        writes = Writes(view, columns_of(read_file(write_file, expected), expected), write_rate)
    loads = tuple(Load(b, r, c) for b in batch for c in connections for r in (rate or (None,)))
    test = LoadTest(target.address, reads, loads, writes, tls=target.tls, **options)  # type: ignore[arg-type]
    result = _run(test)
    if saved is not None:
        result.save(saved)
    if plotted is not None:
        plot(result, plotted)
    show_result(result)
    if not any(point.total().answered for point in result.points):
        raise ServingError("not one request was answered, so nothing was measured")


def axes_of(schema: ServiceSchema, words: Sequence[str], file: Path | None) -> tuple[Axis, ...]:
    """Return what the rows of requests are drawn from; raises InvalidRequest for what is unknown, twice or missing."""
    expected = schema.keys | schema.request_columns
    axes: list[Axis] = []
    named: list[str] = []
    if file is not None:
        columns = {name: column(expected[name], values, name) for name, values in read_file(file, expected).items()}
        named += columns
        if columns:
            axes.append(Listed(columns))
    for word in words:
        name, equals, text = word.partition("=")
        if not equals or name not in expected:
            raise InvalidRequest(f"{word!r} is not COLUMN=VALUES of a column that is asked for{hint(name, expected)}")
        named.append(name)
        low, dots, high = text.partition("..")
        if dots:
            try:
                axes.append(Range(name, expected[name], int(low), int(high)))
            except ValueError:
                raise InvalidRequest(f"{word!r}: a range is of whole numbers, as in {name}=1..100000") from None
        else:
            axes.append(Listed({name: column(expected[name], parse_values(text, expected[name], name), name)}))
    missing = [name for name in expected if name not in named]
    twice = [name for name in expected if named.count(name) > 1]
    if missing or twice:
        told = f"no values for {', '.join(missing)}" if missing else f"{', '.join(twice)}: given twice"
        raise InvalidRequest(f"{told}; name each column once, by COLUMN=LOW..HIGH, COLUMN=a,b,c or --keys-file")
    return tuple(axes)


def _run(test: LoadTest) -> Result:
    with Progress(
        TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TimeRemainingColumn(),
        console=STDERR, disable=not STDERR.is_terminal, transient=True,
    ) as progress:  # fmt: skip
        task = progress.add_task("starting", total=len(test.loads))

        def note_progress(number: int, part: float) -> None:
            load = test.loads[number]
            told = f"{number + 1} of {len(test.loads)}: {counted(load.batch, 'row')} a request, {load}"
            progress.update(task, description=told, completed=number + part)

        return run(test, clock_us(), note_progress)


def show_result(result: Result) -> None:
    """Print what was measured, and what is wrong with it."""
    settings = result.settings
    keys = ", ".join(f"{size:,} of {names}" for names, size in settings["keys"].items())
    drawn = f"by Zipf's law, exponent {settings['zipf']:g}" if settings["zipf"] else "evenly"
    time = f"{counted(settings['rounds'], 'round')} of {settings['round_s']:g} s, after {settings['warm_up_s']:g} s"
    show(
        facts(
            [
                ("service", result.service),
                ("keys", f"{keys}, drawn {drawn}; {100 * result.found:.0f} % of a sample have rows"),
                ("measured", f"{time}, processes that send: {settings['processes']}"),
                ("machine", settings["machine"]),
            ]
        ),
        "",
    )
    numbers = ["rows", "answered/s", *QUANTILES, "errors", "sent late p99"]
    made = table("load", *numbers, right=numbers)
    for point in result.points:
        made.add_row(str(point.load), f"{point.load.batch:,}", *_cells(point.total()))
        if point.writes:
            written = settings["writes"]
            made.add_row(
                f"writes to {written['view']}, {written['rows_per_s']:,.0f} rows/s",
                f"{WRITTEN_AT_ONCE:,}",
                *_cells(point.total_writes()),
            )
    show(made, "", "Latencies are in microseconds.")
    if any(
        point.total().latency.told_ns(quantile) is None for point in result.points for quantile in QUANTILES.values()
    ):
        show("+N: it takes N samples more to tell this, by more or longer rounds.")
    for warning in warnings_of(result):
        note("Note:", warning)


def _cells(total: Round) -> Iterable[str]:
    count = total.latency.count
    yield f"{total.answered / total.seconds:,.0f}"
    for quantile in QUANTILES.values():
        told = total.latency.told_ns(quantile)
        yield f"+{samples_needed(quantile) - count:,}" if told is None else f"{told / 1e3:,.0f}"
    yield ", ".join(f"{number:,} {code}" for code, number in sorted(total.errors.items())) or "0"
    lag = total.lag.told_ns(0.99)
    yield "" if lag is None else f"{lag / 1e3:,.0f}"


def warnings_of(result: Result) -> Iterable[str]:
    """Yield what a reader of the numbers must know."""
    average = result.settings["load_average"]
    if average > BUSY * (os.cpu_count() or 1):
        yield f"the machine was busy before the test began (load average {average:g}); others' work is in the numbers"
    if result.found < 0.5:
        yield f"only {100 * result.found:.0f} % of a sample of the keys have rows; this measures mostly missing ones"
    for point in result.points:
        total, name = point.total(), f"{point.load}, {counted(point.load.batch, 'row')}"
        if not total.kept_up:
            late = total.arrived - total.answered
            yield f"{name}: {late:,} of {total.arrived:,} requests were not answered, or not in the measured time"
        if _lags(total):
            yield f"{name}: the load generator itself was late; give it more --processes or cores, or a lower rate"


def _lags(total: Round) -> bool:
    return total.lag.quantile_ns(0.99) > LAGGING * total.latency.quantile_ns(0.99)


@load_test.command("compare")
@click.argument("first", type=existing, metavar="A.json")
@click.argument("second", type=existing, metavar="B.json")
@as_json
def compare_(first: Path, second: Path, as_json: bool) -> None:
    """Say whether B is faster or slower than A.

    The rounds of each result tell the noise. A difference is told if the rounds, dealt out at random, would show it in
    at most 5 % of cases over all rows together, and if it is at least 3 %. What changed on the machine between two runs
    is no noise of rounds: run A and B in turn, and more than once, before you build on a small difference.

    A and B are means of their rounds, geometric ones.

    \b
    Example:
      featserve load-test compare before.json after.json
    """
    a, b = Result.load(first), Result.load(second)
    found = compare(a, b)
    if as_json:
        show_json([comparison_json(c) for c in found])
        return
    numbers = ["rows", "A", "B", "B to A", "95 % interval", "confidence"]
    made = table("load", "measure", *numbers, "B is", right=numbers)
    for c in found:
        style = {"faster": "green", "slower": "red"}.get(c.verdict, "")
        cells = (f"{c.load.batch:,}", f"{c.first:,.0f}", f"{c.second:,.0f}", f"{100 * (c.ratio - 1):+.1f} %")
        interval = f"{100 * (c.low - 1):+.1f} to {100 * (c.high - 1):+.1f} %"
        made.add_row(str(c.load), c.measure, *cells, interval, f"{100 * (1 - c.chance):.2f} %", Text(c.verdict, style))
    show(made)
    for warning in doubts(a, b, found):
        note("Note:", warning)


def comparison_json(c: Comparison) -> dict[str, object]:
    """Return a comparison as JSON values."""
    return {
        "batch": c.load.batch, "rate": c.load.rate, "connections": c.load.connections, "measure": c.measure,
        "a": c.first, "b": c.second, "ratio": c.ratio, "interval": [c.low, c.high], "chance": c.chance,
        "verdict": c.verdict, "drifting": list(c.drifting),
    }  # fmt: skip


def doubts(a: Result, b: Result, found: Sequence[Comparison]) -> Iterable[str]:
    """Yield why a comparison might mean less than it says."""
    names = ("keys", "zipf", "writes", "processes", "machine", "python", "grpcio")
    if differing := [name for name in names if a.settings.get(name) != b.settings.get(name)]:
        yield f"the results were not measured alike: {', '.join(differing)} differ"
    if any(c.verdict == "cannot tell" for c in found):
        yield f"there are too few rounds to tell a difference; {len(found)} comparisons at once take about 8 of each"
    for label in ("A", "B"):
        if any(label in c.drifting for c in found):
            yield f"the rounds of {label} drift: its machine was not steady, and its verdicts are worth less"
