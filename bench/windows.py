"""Windowed views: requests per second beside a plain view of the same width, and reads while events stream in.

A thousand entities have a thousand events each in seven days. The server has all the views, and is asked for one after
the other in turns, so what else happens on the machine meets all of them. Rows of records that nobody pushes to are
kept from one read to the next; so it is asked for records, too, all of which have changed since they were read.

    python -m bench.windows ADDRESS EVENTS_PER_S SECONDS    push events at that pace; print how many a second came in
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import featserve
from bench import load, servers
from bench.report import ROOT, Figure, number, p99_us
from bench.servers import Server
from featserve._proto import serving_pb2 as pb
from featserve.batch import Arrival, EntityKeys, Int64s
from featserve.config import load_config
from featserve.embedded import clock_us
from featserve.load_test import Load, LoadTest, Range, Reads, run
from featserve.load_test.result import Round, merge
from featserve.load_test.worker import BACKGROUND
from featserve.project import load_definitions
from featserve.registry import Registry
from featserve.types import Column, Float64, Int64
from featserve.windows import DAY_US
from featserve.wire import encode_push

ENTITIES, EVENTS = 1_000, 1_000
KEYS = 100
VIEWS = ("hopping", "calendar", "rolling")
PUSHED = ("plain", "hopping", "calendar")
"""What is asked for after each push: the views of what is pushed, and the one that they are held against."""
TRANSPORTS = ("native", "grpcio")
CONNECTIONS = 8
ROUNDS, SECONDS, PUSHES = 7, 1.5, 30
READ_TURNS = 20
TARGET = 0.5
PUSHED_PER_S, MESSAGE_EVENTS = 20_000, 1_000
READS_PER_S, TURNS, TURN_S = 200.0, 11, 5.0
"""Reads beside pushes: enough for a p99 though they arrive at random."""
STARTING_S = 4.0
"""How much longer pushes take than the reads beside them, which start after them."""
WORKERS = (2, 1)

DEFINITIONS = """
from datetime import timedelta

from featserve import (
    Aggregate, Calendar, Entity, EventSource, FeatureService, FeatureView, Field, Float64, Hopping, Int64,
    ParquetSource, Rolling,
)

hour, day, week = timedelta(hours=1), timedelta(days=1), timedelta(days=7)
account = Entity("account", {"account_id": Int64})


def source(name):
    return EventSource(
        name, [Field("account_id", Int64), Field("amount", Float64), Field("payment_id", Int64)],
        source=ParquetSource("payments.parquet", event_time="event_time"), event_id="payment_id",
    )


payments, transfers = source("payments"), source("transfers")


def view(name, events, short, middle, long):
    return FeatureView(
        name, account, events=events,
        aggregates=[
            Aggregate("count_short", "count", over=short),
            Aggregate("sum_middle", "sum", "amount", over=middle),
            Aggregate("count_long", "count", over=long),
            Aggregate("mean_long", "mean", "amount", over=long),
            Aggregate("max_long", "max", "amount", over=long),
        ],
    )


fields = [Field(name, Int64) for name in "ab"] + [Field(name, Float64) for name in "cde"]
plain = FeatureView("plain", account, fields, source=ParquetSource("plain.parquet", event_time="event_time"))
hopping = view("hopping", payments, Hopping(hour, timedelta(minutes=5)), Hopping(day, hour), Hopping(week, hour))
calendar = view("calendar", payments, *(Calendar(n, "day", "America/New_York") for n in (1, 2, 7)))
rolling = view("rolling", transfers, Rolling(hour), Rolling(day), Rolling(week))
plain_service = FeatureService("plain", [plain], dtype=Float64)
hopping_service = FeatureService("hopping", [hopping], dtype=Float64)
calendar_service = FeatureService("calendar", [calendar], dtype=Float64)
rolling_service = FeatureService("rolling", [rolling], dtype=Float64)
"""


def measure(folder: Path) -> list[Figure]:
    """Make the project, load it, and measure it."""
    folder, copied = folder / "windows", folder / "windows-copied"
    for left in (folder, copied):  # its events are no longer of the last seven days
        shutil.rmtree(left, ignore_errors=True)
    make(folder)
    figures = []
    for transport in TRANSPORTS:
        with servers.ours(folder, transport) as server:
            figures += [*compare(transport, server), *just_pushed(transport, server)]
    figures += in_process(folder)
    # As users start it, with workers that read and one process that all events go to; and with one that does both.
    shutil.copytree(folder, copied)
    for workers in WORKERS:
        with servers.ours(folder, workers=workers) as server, servers.ours(copied, workers=workers) as other:
            told = f"{workers} {'worker' if workers == 1 else 'workers'}"
            figures += [*beside_pushes(told, server, other), processor_time(server)]
    return figures


def make(folder: Path) -> None:
    """Write sources and definitions to ``folder``, apply them, and load all views."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(9)
    rows, now_us = ENTITIES * EVENTS, clock_us()
    times = pa.array(now_us - random.integers(1, 7 * 86_400_000_000, rows)).cast(pa.timestamp("us", "UTC"))
    pq.write_table(
        pa.table(
            {
                "account_id": np.repeat(np.arange(ENTITIES), EVENTS),
                "amount": random.standard_normal(rows),
                "payment_id": np.arange(rows),
                "event_time": times,
            }
        ),
        folder / "payments.parquet",
    )
    plain: dict[str, Any] = {name: random.integers(0, 1_000, ENTITIES) for name in "ab"}
    plain |= {name: random.standard_normal(ENTITIES) for name in "cde"}
    plain |= {"account_id": np.arange(ENTITIES), "event_time": times[:ENTITIES]}
    pq.write_table(pa.table(plain), folder / "plain.parquet")
    (folder / "features.py").write_text(DEFINITIONS, encoding="utf-8")
    (folder / "featserve.toml").write_text("[server]\nport = 0\n", encoding="utf-8")
    config = load_config(folder)
    with Registry.open(config.registry.url) as registry:
        registry.apply(load_definitions(config), "bench", clock_us())
    with featserve.open(folder, write=True) as project:
        for view in ("plain", *VIEWS):
            project.materialize(view)


def compare(told: str, server: Server) -> list[Figure]:
    """Ask for each view in turns; return the figures of each beside those of the plain one. Nobody pushes meanwhile."""
    rates: dict[str, list[float]] = {name: [] for name in ("plain", *VIEWS)}
    for turn in range(-1, ROUNDS):
        for name, found in rates.items():
            rate = requests_per_s(server.address, name, turn + 1)
            if turn >= 0:
                found.append(rate)
    return [
        *_ratios(f"{told}, nothing pushed", rates),
        *(Figure(f"  {name}", statistics.median(found), "req/s") for name, found in rates.items()),
    ]


def just_pushed(told: str, server: Server) -> list[Figure]:
    """Push an event to each entity, then ask once for each, of one view after the other, again and again.

    So every record that is asked for has changed since it was read. Only the time of the requests counts.
    """
    rates: dict[str, list[float]] = {name: [] for name in PUSHED}
    cpu_us: dict[str, list[float]] = {name: [] for name in PUSHED}
    random, requests = np.random.default_rng(11), ENTITIES // KEYS
    opened = [load.Http2Connection(server.address, iter(()), length_varies=True) for _ in range(CONNECTIONS)]
    with featserve.connect(server.address) as client:
        for round_ in range(-1, ROUNDS):
            took_s, cpu_s = (dict.fromkeys(PUSHED, 0.0) for _ in range(2))
            for turn in range(PUSHES):
                push_to_all(client, random)
                first = turn % len(PUSHED)
                for name in PUSHED[first:] + PUSHED[:first]:
                    asked = iter([_request(name, keys) for keys in random.permutation(ENTITIES).reshape(-1, KEYS)])
                    for connection in opened:
                        connection.messages = asked
                    before_s = server.cpu_s()
                    took_s[name] += load.keep_busy(opened, lambda answered, _: answered >= requests)
                    cpu_s[name] += server.cpu_s() - before_s
            if round_ >= 0:
                for name in PUSHED:
                    rates[name].append(requests * PUSHES / took_s[name])
                    cpu_us[name].append(cpu_s[name] / requests / PUSHES * 1e6)
    for connection in opened:
        connection.socket.close()
    notes = {name: f"{number(statistics.median(found))} us of processor each" for name, found in cpu_us.items()}
    return [
        *_ratios(f"{told}, all just pushed to", rates),
        *(Figure(f"  {name}", statistics.median(found), "req/s", note=notes[name]) for name, found in rates.items()),
    ]


def push_to_all(client: featserve.Client, random: np.random.Generator) -> None:
    """Push an event of each entity; raise RuntimeError where they do not all count."""
    events = _events(random, np.arange(ENTITIES), time.time_ns() >> 8)
    counted = client.push_messages(iter([encode_push("payments", events)])).counted
    if counted != ENTITIES:
        raise RuntimeError(f"{counted:,} of {ENTITIES:,} events count")


def _ratios(told: str, rates: dict[str, list[float]]) -> list[Figure]:
    """Return the requests per second of each windowed view, of those of the plain one in the same round."""
    figures = []
    for name in (name for name in rates if name != "plain"):
        ratios = sorted(a / b for a, b in zip(rates[name], rates["plain"], strict=True))
        target = None if name == "rolling" else TARGET
        note = f"{KEYS} keys, rounds {ratios[0]:.2f} to {ratios[-1]:.2f}"
        figures.append(Figure(f"{told}: {name} to plain", statistics.median(ratios), "", target, note=note))
    return figures


def in_process(folder: Path) -> list[Figure]:
    """Return what a read of each view takes of the processor with no server: of records that were read before.

    And of such as were not, as far as windows can tell: instants a day apart have no bucket in common.
    """
    random, now_us = np.random.default_rng(5), clock_us()
    asked = [EntityKeys({"account_id": Column(Int64, random.integers(0, ENTITIES, KEYS))}, KEYS) for _ in range(100)]
    figures: dict[tuple[str, int], float] = {}
    with featserve.open(folder) as project:
        for apart_us, _, name in product((0, DAY_US), range(READ_TURNS), ("plain", *VIEWS)):
            plan = project.engine.plans.service(name)
            began_ns = time.thread_time_ns()
            for i, keys in enumerate(asked):
                project.engine.read(plan, keys, now_us + i % 2 * apart_us)
            took_us = (time.thread_time_ns() - began_ns) / 1e3 / len(asked)
            figures[name, apart_us] = min(figures.get((name, apart_us), took_us), took_us)
    return [
        Figure(f"  {name}, processor time in process", figures[name, 0], "us",
               note=f"records not read before {number(figures[name, DAY_US])} us")
        for name in ("plain", *VIEWS)
    ]  # fmt: skip


def requests_per_s(address: str, service: str, seed: int) -> float:
    """Return how many requests for random entities a second some connections get answered."""

    def messages() -> Iterator[bytes]:
        random = np.random.default_rng(seed)
        while True:
            yield _request(service, random.integers(0, ENTITIES, KEYS))

    asked = messages()
    opened = [load.Http2Connection(address, asked, length_varies=True) for _ in range(CONNECTIONS)]
    elapsed_s = load.drive(opened, lambda answered, elapsed_s: elapsed_s >= SECONDS)
    return sum(len(connection.latencies_s) for connection in opened) / elapsed_s


def _request(service: str, accounts: Int64s) -> bytes:
    """Return a framed request for these entities."""
    column = pb.Column(name="account_id", type=Int64.code, data=accounts.tobytes())  # type: ignore[arg-type]
    return load.framed(pb.GetFeaturesRequest(service=service, keys=[column]).SerializeToString())


def beside_pushes(told: str, server: Server, other: Server) -> list[Figure]:
    """Return the p99 of reads while events stream into two views, beside that of a server left alone.

    ``told``: what servers these are. ``other``: takes the same events in turns. Reads of a server that does not have to
    do with them wait, too, for the processors; what they wait tells how much of the ratio is this machine's.
    """
    found: dict[Server | None, list[Round]] = {None: [], other: [], server: []}
    pushed: list[float] = []
    early = 0
    for turn in range(TURNS + 1):
        if turn == 1:  # the first one warmed up
            found, pushed, early = {to: [] for to in found}, [], 0
        for to, rounds in found.items():
            reads = Reads("hopping", ("account_id",), (Range("account_id", Int64, 0, ENTITIES - 1),))
            test = LoadTest(
                server.address, reads, (Load(1, READS_PER_S, 4),), None,
                rounds=1, round_s=TURN_S, warm_up_s=1.0, seed=turn,
            )  # fmt: skip
            if to is None:
                rounds += [point.total() for point in run(test, clock_us()).points]
                continue
            with pushing_process(to, TURN_S + STARTING_S) as process:
                rounds += [point.total() for point in run(test, clock_us()).points]
                early += process.poll() is not None
                events_per_s = float(process.communicate()[0])
            if to is server:
                pushed.append(events_per_s)
    alone, beside, busy = (_all(rounds) for rounds in found.values())
    p99s = [p99_us(total.latency) for total in (alone, beside, busy)]
    p50_us = busy.latency.quantile_ns(0.5) / 1e3
    errors = sum((total.errors for total in (alone, beside, busy)), Counter[str]())
    return [
        Figure(f"{told}: events pushed", min(pushed), "events/s", 0.98 * PUSHED_PER_S),
        Figure("  p99 of reads while pushing to p99 alone", p99s[2] / p99s[0], "", 2.0, at_most=True),
        Figure("  the same, pushing to another server", p99s[1] / p99s[0], "", note="what the machine makes of it"),
        Figure("  p99 alone", p99s[0], "us", note=f"{alone.latency.count:,} requests"),
        Figure("  p99 while pushing", p99s[2], "us", note=f"{busy.latency.count:,} requests, p50 {number(p50_us)} us"),
        Figure("  errors", errors.total(), "", 0, at_most=True, note=", ".join(errors)),
        Figure("  turns in which pushes ended before reads did", early, "", 0, at_most=True),
    ]


def processor_time(server: Server) -> Figure:
    """Return what an event takes in all processes of a server that nobody reads from, beyond what they take idle."""
    took: list[float] = []
    for pushing in (False, True):
        began, before = time.perf_counter(), server.cpu_s()
        if pushing:
            with pushing_process(server, TURN_S) as process:
                process.wait()
        else:
            time.sleep(TURN_S)
        elapsed_s = time.perf_counter() - began
        took.append((server.cpu_s() - before) / elapsed_s)
    events_per_s = PUSHED_PER_S * TURN_S / elapsed_s
    return Figure("  processor time for an event", (took[1] - took[0]) / events_per_s * 1e6, "us")


def pushing_process(server: Server, seconds: float) -> subprocess.Popen[str]:
    """Start a process that pushes, so that what it takes is not the server's; it prints how many events came in.

    It has begun to push by then.
    """
    command = [sys.executable, "-m", "bench.windows", server.address, str(PUSHED_PER_S), str(seconds)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    return process


def _all(rounds: list[Round]) -> Round:
    return merge(rounds, sum(each.seconds for each in rounds))


def push(address: str, events_per_s: float, seconds: float) -> float:
    """Push events of random entities at a pace, on one stream; print when it begins, return how many a second count."""
    os.nice(BACKGROUND)
    random = np.random.default_rng(int(time.time()))
    ids = time.time_ns() >> 8

    def messages() -> Iterator[pb.PushEventsRequest]:
        print("pushing", flush=True)
        began = time.perf_counter()
        for i in range(int(seconds * events_per_s / MESSAGE_EVENTS)):
            time.sleep(max(0.0, began + i * MESSAGE_EVENTS / events_per_s - time.perf_counter()))
            accounts = random.integers(0, ENTITIES, MESSAGE_EVENTS)
            yield encode_push("payments", _events(random, accounts, ids + i * MESSAGE_EVENTS))

    with featserve.connect(address) as client:
        started = time.perf_counter()
        pushed = client.push_messages(messages())
        elapsed_s = time.perf_counter() - started
    return pushed.counted / elapsed_s


def _events(random: np.random.Generator, accounts: Int64s, first_id: int) -> Arrival:
    """Return an event of now for each of these entities."""
    times: Int64s = np.full(len(accounts), clock_us())
    columns = {
        "account_id": Column(Int64, accounts),
        "amount": Column(Float64, random.standard_normal(len(accounts))),
        "payment_id": Column(Int64, np.arange(first_id, first_id + len(accounts))),
    }
    return Arrival(columns, times)


if __name__ == "__main__":
    print(push(sys.argv[1], float(sys.argv[2]), float(sys.argv[3])))
