"""The whole way, on a year of real flights: load, serve, ask, train, predict. ``make demo`` runs it; it ends by itself.

Every number that it prints is measured while it runs.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import grpc
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

import featserve
from examples.flights import model
from examples.flights.project import (
    ENVIRONMENT,
    FOLDER,
    LATER,
    MADE,
    REPORT,
    SERVICE,
    THEN,
    THEN_TEXT,
    WIDTH,
    command,
    flights_at,
    make_afresh,
    reported_between,
)
from featserve._proto import serving_pb2 as pb
from featserve._proto.serving_pb2_grpc import FeatureServingServiceStub
from featserve.types import NEVER_US, column, to_us
from featserve.wire import decode_matrix, decode_schema, encode_column

CALLS = 2_000
SHOWN = 5
FRAME = MADE / "training.parquet"
PLOT = MADE / "leakage.html"
UNITS = (("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1))

CONSOLE = Console(width=WIDTH, highlight=False)


def main() -> None:
    started = time.monotonic()
    say("\n[bold]1. Make the data: all flights that left New York in 2013, with what was known when[/]")
    make_afresh()
    say("\n[bold]2. Publish the definitions of examples/flights/features.py, load what was visible at one instant[/]")
    command("apply", last=1)
    command("materialize", "--as-of", THEN_TEXT)
    say("Of each entity the store keeps the newest row, and of its windows what they hold; all rows were checked.")
    flights = flights_at(THEN)
    with serving() as address:
        ask(address, flights)
        train()
        leak()
        predict(address, flights)
        push(address)
    say(
        f"\nThe server was told to stop, and did. All of this took {time.monotonic() - started:.0f} s.",
        "`make serve` leaves it running, and says how to ask it; README.md goes on from here.",
    )


def say(*parts: str | Table) -> None:
    """Print texts and tables; no line ends in blanks."""
    with CONSOLE.capture() as captured:
        CONSOLE.print(*parts, sep="\n")
    print("\n".join(line.rstrip() for line in captured.get().splitlines()), flush=True)


@contextmanager
def serving() -> Iterator[str]:
    """Run the server as a process of its own; yield its address, and stop it by SIGTERM."""
    log = MADE / "server.log"
    with log.open("wb") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "featserve", "serve", "--port", "0"],
            cwd=FOLDER,
            env=ENVIRONMENT,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line.startswith("Listening on "):
            raise SystemExit(f"the server did not start:\n{line}{log.read_text()}")
        yield line.split()[-1]
    finally:
        process.terminate()
        code = process.wait(30)
    if code:
        raise SystemExit(f"the server ended with exit code {code}:\n{log.read_text()}")


def ask(address: str, flights: Any) -> None:
    """Ask the server through the generated stub for the vectors of a batch of flights, and then for speed."""
    say(
        f"\n[bold]3. Serve, and ask for the {len(flights)} flights due to leave at {THEN_TEXT}, as of then[/]",
        f"The afternoon before Thanksgiving, in a storm. {SHOWN} of them, with status and age of every view:",
    )
    with grpc.insecure_channel(address) as channel:
        stub = FeatureServingServiceStub(channel)
        schema = decode_schema(stub.DescribeService(pb.DescribeServiceRequest(service=SERVICE)).schema)
        request = request_for(flights, schema)
        answer = stub.GetFeatures(request)
        show(decode_matrix(answer, schema), one_a_carrier(flights))
        say(f"\n[bold]4. Time {CALLS:,} requests, one after the other[/]")
        say("From this process in Python to the server and back, which are on one machine:")
        for batch in (request_for(flights.slice(0, 1), schema), request):
            time_calls(stub, batch)


def request_for(flights: Any, schema: Any) -> pb.GetFeaturesRequest:
    """Return the message that asks for flights as of THEN."""

    def columns(types: dict[str, Any]) -> list[pb.Column]:
        return [encode_column(name, column(type_, flights[name].to_pylist(), name)) for name, type_ in types.items()]

    return pb.GetFeaturesRequest(
        service=SERVICE,
        keys=columns(schema.keys),
        request_columns=columns(schema.request_columns),
        as_of_us=to_us(THEN),
        include_event_times=True,
    )


def one_a_carrier(flights: Any) -> dict[str, int]:
    """Return some rows of ``flights``, each of another carrier, by what to call the flight."""
    carriers, numbers, routes = (flights[name].to_pylist() for name in ("carrier", "flight_number", "dest"))
    rows = [carriers.index(carrier) for carrier in dict.fromkeys(carriers)]
    return {f"{carriers[i]} {numbers[i]}\n{flights['origin'][i]}-{routes[i]}": i for i in rows[:SHOWN]}


def show(matrix: featserve.FeatureMatrix, chosen: dict[str, int]) -> None:
    """Print the features of some rows, under the status and the age of the view that they are of."""
    table = Table(box=None, pad_edge=False, padding=(0, 0, 0, 1), header_style="bold")
    table.add_column("feature", no_wrap=True)
    for name in chosen:
        table.add_column(name, justify="right", no_wrap=True)
    values, statuses = matrix.to_dict(), matrix.status
    assert matrix.event_times is not None
    last = ""
    for number, f in enumerate(matrix.schema.features):
        source, _, name = f.name.partition(".")
        if source != last:
            heads = ["computed" if f.view is None else told(matrix, row, f.view) for row in chosen.values()]
            table.add_row(source, *heads, style="cyan")
            last = source
        cells = [cell(values[f.name][row], featserve.Status(statuses[row, number])) for row in chosen.values()]
        table.add_row(f"  {name}", *cells)
    say(table)


def told(matrix: featserve.FeatureMatrix, row: int, view: int) -> str:
    """Return a view's status in a row, and how old what it has is."""
    assert matrix.event_times is not None
    status, event_time_us = featserve.Status(matrix.view_status[row, view]).name, int(matrix.event_times[row, view])
    if event_time_us == NEVER_US:
        return status
    seconds = (to_us(THEN) - event_time_us) // 1_000_000
    unit, size = next(((unit, size) for unit, size in UNITS if seconds >= size), UNITS[-1])
    return f"{status} {seconds // size} {unit}"


def cell(value: Any, status: featserve.Status) -> str:
    if value is None:
        return "null" if status is featserve.Status.NULL else "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    text = f"{value:%d %b %H:%M}" if hasattr(value, "hour") else str(value)
    return text if len(text) <= 14 else text[:13] + "…"


def time_calls(stub: FeatureServingServiceStub, request: pb.GetFeaturesRequest) -> None:
    for _ in range(100):  # the first calls open the connection and fill caches
        stub.GetFeatures(request)
    took = np.empty(CALLS)
    for i in range(CALLS):
        start = time.perf_counter()
        answer = stub.GetFeatures(request)
        took[i] = time.perf_counter() - start
    p50, p90 = np.percentile(took * 1_000, [50, 90])  # so few calls tell no p99
    flights = "1 flight " if answer.rows == 1 else f"{answer.rows} flights"
    say(f"  {flights:>10} a request: p50 {p50:.2f} ms, p90 {p90:.2f} ms, {answer.ByteSize():,} bytes an answer")


def train() -> None:
    say("\n[bold]5. Make a training frame: every flight of the year, with what was known when it was due to leave[/]")
    command(
        "train", SERVICE, "--labels", "data/flights.parquet", "--time", "scheduled_departure",
        "--out", str(FRAME.relative_to(FOLDER)),
    )  # fmt: skip


def leak() -> None:
    say("\n[bold]6. See what careless joins would have leaked into it[/]")
    command(
        "leakage", SERVICE, "--labels", "data/flights.parquet", "--time", "scheduled_departure",
        "--label", "departure_delay_min", "--plot", str(PLOT.relative_to(FOLDER)),
        first=16,
    )  # fmt: skip
    say("A join on event time alone would have shown the model, in the first two, what it is to predict.")
    say(f"The whole report, drawn: {PLOT}")


def predict(address: str, flights: Any) -> None:
    """Train a model on the frame, and predict from vectors that are fetched through the client."""
    say(f"\n[bold]7. Train a model of leaving over {model.LATE_MIN} minutes late, and predict from served vectors[/]")
    frame = pq.read_table(FRAME)
    with featserve.connect(address) as client:
        served = client.get(SERVICE, flights, as_of=THEN)
    fitted, judged = model.fit(frame, served.names)
    say(
        f"Learned from {judged.learned_from:,} flights to September, judged by {judged.judged_by:,} from October on:\n"
        f"  ROC AUC {judged.auc:.3f}. Of all, {judged.late:.1%} left late; of the tenth thought riskiest, "
        f"{judged.late_of_riskiest:.1%}.\n"
    )
    table = Table(box=None, pad_edge=False, padding=(0, 0, 0, 1), header_style="bold")
    for name in ("flight", "route", "risk", "what happened"):
        table.add_column(name, justify="right" if name == "risk" else "left")
    risk = model.risks(fitted, served.values)
    for row in np.argsort(-risk)[[*range(3), *range(-3, 0)]].tolist():
        flight = flights.slice(row, 1).to_pylist()[0]
        delay = flight["departure_delay_min"]
        happened = "cancelled" if delay is None else f"left {abs(delay)} min {'late' if delay > 0 else 'early'}"
        table.add_row(
            f"{flight['carrier']} {flight['flight_number']}", f"{flight['origin']}-{flight['dest']}",
            f"{risk[row]:.0%}", happened if delay else "left on time",
        )  # fmt: skip
    say(f"The vectors served for {THEN_TEXT}: the riskiest and the safest three of {len(flights)}")
    say(table)
    compare(served, frame)


def compare(served: featserve.FeatureMatrix, frame: Any) -> None:
    """Hold the served vectors against the rows of the training frame for the same flights, bit by bit."""
    say("\n[bold]8. Hold what was served against what was trained on[/]")
    same = frame.filter(pc.equal(frame["scheduled_departure"], THEN))
    same = same.sort_by([("carrier", "ascending"), ("flight_number", "ascending")])
    asked = served.to_arrow()
    different = [name for name in asked.column_names if bits(asked[name]) != bits(same[name])]
    if different:
        raise SystemExit(f"served and trained on are not the same: {', '.join(different)}")
    features = len(asked.column_names)
    say(
        f"{len(same)} flights x {features} features, {len(same) * features} values: the vectors that were served as of "
        f"{THEN_TEXT}\nand these flights' rows of the training frame are equal to the last bit."
    )


def push(address: str) -> None:
    """Push the departures of the next hour, twice, and ask how late carriers have been by two meanings of a week."""
    say("\n[bold]9. Push the departures of the next hour as they were reported, and ask what a week of them is like[/]")
    events = reported_between(THEN, LATER)
    columns = ["flight_id", "carrier", "tailnum", "origin", "dest", "departure_delay_min", "departed_at", "known_at"]
    batches = [events.select(columns).slice(start, 10) for start in range(0, len(events), 10)]
    carriers = pc.unique(events["carrier"]).sort().to_pylist()
    with featserve.connect(address) as client:
        once, again = (
            client.push_stream("departures", batches, event_time="departed_at", known_at="known_at") for _ in range(2)
        )
        served = client.get(REPORT, {"carrier": carriers}, as_of=LATER)
    say(
        f"{once.events} departures pushed, {once.counted} counted; pushed again, {again.counted} counted and "
        f"{again.duplicates} known by their flight_id.",
        f'The mean delay of "the last 7 days" at {LATER:%Y-%m-%dT%H:%MZ}, for the carriers with one of them:',
    )
    table = Table(box=None, pad_edge=False, padding=(0, 0, 0, 2), header_style="bold")
    for name in ("carrier", "168 hours", "7 days in New York", "apart"):
        table.add_column(name, justify="left" if name == "carrier" else "right")
    for carrier, (rolling, calendar) in zip(carriers, served.values.tolist(), strict=True):
        table.add_row(carrier, f"{rolling:.2f} min", f"{calendar:.2f} min", f"{abs(rolling - calendar):.2f}")
    say(table)
    labels = {"carrier": carriers, "at": [LATER] * len(carriers)}
    with featserve.open(FOLDER) as project:
        trained = project.training_frame(REPORT, labels, time="at").select(list(served.names))
    if any(bits(served.to_arrow()[name]) != bits(trained[name]) for name in served.names):
        raise SystemExit("the windows that are served and those of a training frame are not the same")
    say("What is served of events loaded and pushed equals what a training frame holds, to the last bit.")


def bits(values: Any) -> list[Any]:
    """Return values so that equal means equal to the last bit."""
    if pa.types.is_floating(values.type):
        return [None if value is None else value.hex() for value in values.to_pylist()]
    return list(values.to_pylist())


if __name__ == "__main__":
    main()
