"""Metrics of a real server, read as Prometheus reads them and held against what was asked and answered."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import time
from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime
from pathlib import Path

import grpc
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from featserve._proto import serving_pb2 as pb
from featserve._proto.serving_pb2_grpc import FeatureServingServiceStub
from featserve.matrix import Status
from featserve.server.meter import DELAY_NS, LATENCY_NS, MS, Meter
from featserve.server.telemetry import Telemetry
from featserve.store import open_store
from tests.server.held import Held
from tests.server.messages import HOUR_US, activity, now_us, nulls, numbers, packed, refusal, weather, wide
from tests.server.test_killed_workers import ORDERS
from tests.server.watched import page, scored, scrape, value, watched
from tests.serving import PATIENCE_S, ROOT, TRANSPORTS, Project, Server, served_here, until

pytest_plugins = ["tests.served"]

DASHBOARD = ROOT / "dashboards" / "featserve.json"
DURATION = "rpc_server_call_duration_seconds"
LOOKS = "featserve_event_loop_delay_seconds_count"
"""How often a server looked what its event loop is at, and what gRPC ended by itself."""
SERVICE = "featserve.v1.FeatureServingService"


@pytest.fixture(scope="module")
def counted(transport: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Run a server that counts, for the tests that look at differences only."""
    folder = tmp_path_factory.mktemp("counted") / "p"
    with watched(folder, transport, {"max_message_mb": 1}, prometheus_port=0) as server:
        server.apply(ORDERS)
        yield server


def test_requests_are_counted_by_method_service_and_code(counted: Server) -> None:
    """Each request is one entry of the latency histogram, under its method, service version and status code."""
    before = scrape(counted)
    with counted.stub() as stub:
        for _ in range(3):
            stub.GetFeatures(wide(1, 2))
        stub.GetFeatures(scored(1))
        requests = [wide(1), pb.GetFeaturesRequest(service="nope")]
        list(stub.StreamFeatures(pb.StreamFeaturesRequest(request=r) for r in requests))
        stub.WriteRows(activity(1, now_us()))
        for wrong in (pb.GetFeaturesRequest(service="nope"), wide(), scored(1, by=666.0)):
            with pytest.raises(grpc.RpcError):
                stub.GetFeatures(wrong)
    after = scrape(counted)

    def new(method: str, service: str, code: str, part: str = "count", **labels: str) -> float:
        labels |= {"rpc_method": f"{SERVICE}/{method}", "featserve_service": service, "rpc_response_status_code": code}
        name = f"{DURATION}_{part}"
        return value(after, name, **labels) - value(before, name, **labels)

    assert new("GetFeatures", "wide@1", "OK") == 3
    assert new("GetFeatures", "scored@3", "OK") == 1
    assert new("GetFeatures", "scored@3", "INTERNAL") == 1
    assert new("GetFeatures", "wide@1", "INVALID_ARGUMENT") == 1
    assert new("GetFeatures", "", "NOT_FOUND") == 1
    assert new("StreamFeatures", "wide@1", "OK") == 1
    assert new("StreamFeatures", "", "NOT_FOUND") == 1
    assert new("WriteRows", "", "OK") == 1
    assert new("GetFeatures", "wide@1", "OK", "bucket", le="+Inf") == 3
    assert 0 < new("GetFeatures", "wide@1", "OK", "sum") < 60
    # Buckets only rise, from 25 µs to 5 s, and tell 100 µs from 150.
    bounds = sorted({float(dict(labels)["le"]) for (name, labels) in after if name == f"{DURATION}_bucket"})
    assert bounds[:-1] == [ns / 1e9 for ns in LATENCY_NS]
    assert {0.0001, 0.00015, 0.001, 0.1, 1.0} <= set(bounds)
    counts = [new("GetFeatures", "wide@1", "OK", "bucket", le=str(bound)) for bound in bounds[:-1]]
    assert counts == sorted(counts)


def test_rows_are_counted_by_what_their_view_had(counted: Server, rng: np.random.Generator) -> None:
    """Rows that were present, missing or expired, and nulls, are counted as the answers say, for random requests."""
    event_us = now_us()
    with counted.stub() as stub:
        stub.WriteRows(weather("de", "10115", 20.5, 3.25, event_us))
        for user in range(200, 240):
            kind = rng.integers(4)  # 0: no row
            if kind:
                score = nulls(packed("score", "f", 0.0), False) if kind == 1 else packed("score", "f", 1.0)
                stub.WriteRows(activity(user, event_us - (HOUR_US + 9_000_000 if kind == 2 else 0), score=score))
        before = scrape(counted)
        expected: Counter[str] = Counter()
        for _ in range(30):
            request = scored(*rng.integers(200, 240, rng.integers(1, 40)).tolist())
            answer = stub.GetFeatures(request)
            status = np.frombuffer(answer.status, np.uint8).reshape(answer.rows, 2)
            expected["rows"] += answer.rows
            expected.update(f"activity {Status(s).name.lower()}" for s in status[:, 0])
            expected.update(f"weather {Status(s).name.lower()}" for s in status[:, 1])
            if answer.validity:
                bits = np.frombuffer(answer.validity, np.uint8).reshape(answer.rows, -1)
                valid = np.unpackbits(bits, axis=1, count=4, bitorder="little")
                expected["nulls"] += int((valid[status[:, 0] == Status.PRESENT, :2] == 0).sum())
    after = scrape(counted)

    def new(name: str, **labels: str) -> int:
        labels["featserve_service"] = "scored@3"
        return int(value(after, name, **labels) - value(before, name, **labels))

    assert new("featserve_rows_read_total") == expected["rows"]
    for view in ("activity", "weather"):
        for status_ in ("present", "not_found", "expired"):
            labels = {"featserve_view": f"{view}@1", "featserve_status": status_}
            assert new("featserve_view_rows_total", **labels) == expected[f"{view} {status_}"]
    assert new("featserve_view_nulls_total", featserve_view="activity@1") == expected["nulls"]
    assert new("featserve_view_nulls_total", featserve_view="weather@1") == 0
    assert expected["activity expired"] > 0
    assert expected["nulls"] > 0


def test_ages_of_served_rows_are_counted_by_view(counted: Server) -> None:
    """A row that is two minutes old is in the bucket from one to five minutes; a row that is not served is in none."""
    labels = {"featserve_view": "numbers@1"}
    with counted.stub() as stub:
        stub.WriteRows(numbers([900, 901], 1.0, now_us() - 120_000_000))

        def ask() -> float:
            stub.GetFeatures(wide(900, 901, 902))
            return value(scrape(counted), "featserve_view_age_seconds_count", **labels)

        before = scrape(counted)
        until("an answer was looked at", lambda: ask() > value(before, "featserve_view_age_seconds_count", **labels))
    after = scrape(counted)

    def new(part: str, **more: str) -> float:
        name = f"featserve_view_age_seconds_{part}"
        return value(after, name, **labels, **more) - value(before, name, **labels, **more)

    rows = new("count")
    assert rows % 2 == 0
    assert (new("bucket", le="60.0"), new("bucket", le="300.0")) == (0, rows)
    assert 120 * rows <= new("sum") < 300 * rows


def test_writes_and_the_store_are_counted(counted: Server) -> None:
    """Rows written and stored are counted by view; the store has a size, and its caches hits and misses."""
    event_us = now_us()
    with counted.stub() as stub:
        before = scrape(counted)
        stub.WriteRows(numbers(range(1_000, 1_010), 1.0, event_us))
        stub.WriteRows(numbers(range(1_005, 1_015), 1.0, event_us - 1))
        stub.StreamRows(iter([pb.StreamRowsRequest(request=numbers([1_020], 1.0))]))
        for _ in range(5):
            stub.GetFeatures(wide(*range(1_000, 1_010)))
    after = scrape(counted)

    def new(name: str, **labels: str) -> float:
        return value(after, name, **labels) - value(before, name, **labels)

    assert new("featserve_rows_written_total", featserve_view="numbers@1") == 21
    assert new("featserve_rows_stored_total", featserve_view="numbers@1") == 16
    assert value(after, "featserve_store_size_bytes") > 1_000
    lookups = [dict(have) for name, have in after if name == "featserve_store_lookups_total"]
    assert {(of["featserve_cache"], of["featserve_result"]) for of in lookups} == {
        ("block", "hit"), ("block", "miss"), ("row", "hit"), ("row", "miss")
    }  # fmt: skip
    # Of five reads of ten rows the first one may find none of them in memory; writes look rows up, too.
    assert new("featserve_store_lookups_total", featserve_cache="row", featserve_result="hit") >= 40


def test_every_call_that_is_refused_as_too_many_is_counted(transport: str, tmp_path: Path) -> None:
    """Of calls that all come at once those without an answer count as shed, whoever ended them; others never do."""
    with watched(tmp_path / "p", transport, {"max_concurrent": 8}, prometheus_port=0) as server, server.stub() as stub:

        def shed() -> float:
            return value(scrape(server), "featserve_requests_shed_total")

        for _ in range(50):
            stub.GetFeatures(wide(1))
        assert shed() == 0
        calls = [stub.GetFeatures.future(wide(1), timeout=PATIENCE_S) for _ in range(2_000)]
        refused = Counter(call.code() for call in calls if call.exception() is not None)
        assert set(refused) <= {grpc.StatusCode.RESOURCE_EXHAUSTED, grpc.StatusCode.CANCELLED}
        assert sum(refused.values()) > 100
        until("all are counted", lambda: shed() == sum(refused.values()))
        looked, before = set(), value(scrape(server), LOOKS)
        while value(found := scrape(server), LOOKS) < before + 20:
            looked.add(value(found, "featserve_requests_shed_total"))
            for _ in range(20):
                stub.GetFeatures(wide(1))
        assert looked == {sum(refused.values())}


def test_pushed_events_are_counted_by_what_became_of_them(counted: Server) -> None:
    """An event that counts, one whose id was there, one that is late and one without a key are told apart by source."""
    before = scrape(counted)
    now, long_ago = datetime.now(UTC), datetime(2020, 1, 1, tzinfo=UTC)
    with counted.client() as client:
        for users, ids, at in (([1, 2, 3], ["a", "b", "c"], now), ([1, None], ["a", "d"], now), ([1], ["e"], long_ago)):
            client.push("orders", {"user_id": users, "order_id": ids}, event_time=[at] * len(users))
    after = scrape(counted)

    def new(outcome: str) -> float:
        name, labels = "featserve_events_pushed_total", {"featserve_source": "orders", "featserve_outcome": outcome}
        return value(after, name, **labels) - value(before, name, **labels)

    assert [new(outcome) for outcome in ("counted", "duplicate", "late", "no_key")] == [3, 1, 1, 1]


def test_the_caches_of_a_store_count_hits_and_misses(tmp_path: Path) -> None:
    """A row that is read again comes from the row cache; a store that is not told to count does not count blocks."""
    keys = [f"key-{i}".encode() for i in range(50)]
    with closing(open_store(tmp_path / "s", "write")) as store, store.load() as load:
        load.add(sorted(keys), [bytes(100)] * 50)
    with closing(open_store(tmp_path / "s", "read", count_lookups=True)) as store:
        before = store.cache_lookups()["row"]
        store.read_many(keys)
        store.read_many(keys[:20])
        hits, misses = (now - then for now, then in zip(store.cache_lookups()["row"], before, strict=True))
        assert (hits, misses) == (20, 50)
        assert store.cache_lookups()["block"][1] > 0
    with closing(open_store(tmp_path / "s", "read")) as store:
        assert store.cache_lookups() == {"row": (0, 0)}


def test_the_delay_of_the_event_loop_is_looked_at(counted: Server) -> None:
    """The event loop's delay is looked at again and again, whether there are requests or not."""
    before = value(scrape(counted), LOOKS)
    until("it was looked at", lambda: value(scrape(counted), LOOKS) > before + 3)


def test_a_delay_of_who_answers_is_counted(transport: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a read holds up all others for 0.4 s, event loop or thread, a delay of 0.2 to 0.5 s, or more, is seen."""
    reads, meter = Held(monkeypatch), Meter()
    monkeypatch.setattr(Telemetry, "open", lambda *arguments: Telemetry(None, meter))

    def late() -> int:
        return sum(meter.loop_delay.counts[bisect_right(DELAY_NS, 200 * MS) :])

    def ask(address: str) -> None:
        with grpc.insecure_channel(address) as channel:
            before = late()
            with reads.held() as begun:
                call = FeatureServingServiceStub(channel).GetFeatures.future(wide(1), timeout=PATIENCE_S)
                assert begun.wait(PATIENCE_S)
                time.sleep(0.4)
            assert call.result().rows == 1
            looks = sum(meter.loop_delay.counts)
            until("it was looked at again", lambda: sum(meter.loop_delay.counts) > looks + 1)
            assert late() > before

    served_here(Project.make(tmp_path / "project", **TRANSPORTS[transport]), ask)


def test_the_page_is_named_as_prometheus_wants_it(counted: Server) -> None:
    """Names are of one form, times are in seconds, everything is described, and the page says whose it is."""
    text = page(counted)
    families = list(text_string_to_metric_families(text))
    for family in families:
        assert family.documentation, family.name
        assert re.fullmatch(r"(featserve|rpc_server|target)_[a-z_]+", family.name), family.name
        assert family.type in ("counter", "gauge", "histogram"), family.name
        if family.type == "histogram":
            assert family.name.endswith("_seconds")
    assert 'service_name="featserve"' in text
    assert len({family.name for family in families}) == len(families)


def test_the_dashboard_asks_for_what_is_exported(counted: Server) -> None:
    """Metrics of a panel are on the page, with its labels and the values that it picks; every metric is on a panel."""
    with counted.stub() as stub:
        stub.WriteRows(numbers([1], 1.0))
        stub.GetFeatures(wide(1))
        assert refusal(lambda: stub.GetFeatures(wide(*range(10_000)))).code is grpc.StatusCode.RESOURCE_EXHAUSTED
    with counted.client() as client:
        client.push("orders", {"user_id": [9], "order_id": ["dashboard"]}, event_time=datetime.now(UTC))
    found: dict[str, dict[str, set[str]]] = defaultdict(lambda: {"job": {"$job"}, "instance": set()})
    for name, have in scrape(counted):
        labels = found[name]
        for label, text in have:
            labels.setdefault(label, set()).add(text)
    names = found.keys() - {"target_info"}
    asked: set[str] = set()
    dashboard = json.loads(DASHBOARD.read_text())
    panels = [panel for panel in dashboard["panels"] if panel["type"] != "row"]
    for panel in panels:
        assert panel["targets"], panel["title"]
        for target in panel["targets"]:
            groups = re.findall(r"\b(?:by|on) \(([^)]*)\)", target["expr"])
            used = {label for group in groups for label in group.split(", ")}
            used |= set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            picked = re.findall(r"\b((?:featserve|rpc_server)_\w+)\{([^}]*)\}", target["expr"])
            bare = re.sub(r"\{[^}]*\}|\b(?:by|on) \([^)]*\)", "", target["expr"])
            named = set(re.findall(r"\b(?:featserve|rpc_server)_\w+", bare))
            assert named == {name for name, _ in picked} != set(), target["expr"]
            assert named <= names, f"{panel['title']}: {named - names} is not exported"
            asked |= named
            for name, matchers in picked:
                assert used <= found[name].keys(), f"{panel['title']}: {name} has no {used - found[name].keys()}"
                for label, operator, text in re.findall(r"(\w+)(=~|!~|!=|=)\"([^\"]*)\"", matchers):
                    pattern = text if "~" in operator else re.escape(text)
                    assert any(re.fullmatch(pattern, each) for each in found[name][label]), f"{name}: {label} {text}"
    families = {re.sub(r"_(bucket|count|sum)$", "", name) for name in names}
    assert families <= {re.sub(r"_(bucket|count|sum)$", "", name) for name in asked}
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(ids) == len(set(ids))


def test_a_port_that_is_taken_is_an_error_that_says_so(tmp_path: Path, transport: str) -> None:
    """A server whose port for metrics another process has does not start, and says which port and what to do."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = watched(tmp_path / "p", transport, prometheus_port=port)
        assert server.process.wait(60) != 0
        server.close()
    text = server.log.read_text()
    assert f"cannot listen on 127.0.0.1:{port} for metrics: Address already in use" in text
    assert "Choose another [telemetry] prometheus_port" in text


def test_without_settings_nothing_of_opentelemetry_is_loaded() -> None:
    """A server that neither traces nor counts does not import OpenTelemetry or Prometheus."""
    code = (
        "import sys; from featserve.server.app import serve; from featserve.server.telemetry import Telemetry;"
        "from featserve.config import Config; from pathlib import Path; Telemetry.open(Config(Path('.')), None);"
        "print([m for m in sys.modules if m.startswith(('opentelemetry', 'prometheus'))])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
