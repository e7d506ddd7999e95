"""Traces of a real server, received by the protocol's own service: what a span says, who is traced, what it costs."""

from __future__ import annotations

import time
from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from pathlib import Path
from queue import SimpleQueue
from random import Random
from typing import Any

import grpc
import numpy as np
import pytest
from opentelemetry.proto.trace.v1.trace_pb2 import ScopeSpans, Span
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

import featserve
from featserve._proto import serving_pb2 as pb
from featserve.config import TelemetryConfig
from featserve.errors import ServingError
from featserve.server.service import Call, Limits, Service
from featserve.server.telemetry import UNWATCHED, Telemetry, trace_together
from featserve.server.tracing import LOCAL, REMOTE, Trace, Tracing
from featserve.stages import Stages
from tests.server.collector import Collector
from tests.server.messages import HOUR_US, activity, now_us, nulls, numbers, packed, ranking, weather, wide
from tests.server.test_forward import VISITS
from tests.server.watched import scored, watched
from tests.serving import PATIENCE_S, Project, Server, until

pytest_plugins = ["tests.served"]

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
METHOD = "featserve.v1.FeatureServingService/"
FIRST = {"grpcio": "receive", "native": "queue"}
"""What a request begins with: waiting for its message, or, where that came with it, for its turn."""
Headers = tuple[tuple[str, str | bytes], ...]
STAGES = [
    "decode", "plan", "keys", "store read", "codec activity@1", "codec weather@1", "transform scaled@1",
    "place", "encode",
]  # fmt: skip


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let spans be sent at once."""
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as collector:
        yield collector


def traced(flags: str = "01", **more: str) -> Headers:
    """Return the headers of a caller that traces."""
    return ("traceparent", f"00-{TRACE}-{PARENT}-{flags}"), *more.items()


def asked(server: Server, request: pb.GetFeaturesRequest, headers: Headers) -> pb.GetFeaturesResponse:
    with server.stub() as stub:
        answer: pb.GetFeaturesResponse = stub.GetFeatures(request, metadata=headers)
    return answer


def test_a_request_is_a_span_with_one_below_it_for_each_stage(
    transport: str, tmp_path: Path, collector: Collector
) -> None:
    """The server's span says what was asked and found; its stages follow one another and fill it."""
    with watched(tmp_path / "p", transport, otlp_endpoint=collector.endpoint, sample_ratio=0) as server:
        event_us = now_us()
        with server.stub() as stub:
            stub.WriteRows(activity(1, event_us, score=nulls(packed("score", "f", 0.0), False)))
            stub.WriteRows(activity(2, event_us - HOUR_US - 1_000_000))
            stub.WriteRows(weather("de", "10115", 20.5, 3.25, event_us))
        before_ns = time.time_ns()
        asked(server, scored(1, 2, 3, 1), traced(tracestate="vendor=1"))
        after_ns = time.time_ns()
        (tree,) = collector.trees(1)
    span = tree.span
    assert (span.name, span.trace_id.hex(), span.parent_span_id.hex()) == (f"{METHOD}GetFeatures", TRACE, PARENT)
    assert (span.status.code, span.trace_state, collector.resource["service.name"]) == (0, "vendor=1", "featserve")
    assert tree.attributes == {
        "rpc.system.name": "grpc",
        "rpc.method": f"{METHOD}GetFeatures",
        "rpc.response.status_code": "OK",
        "featserve.service.name": "scored",
        "featserve.service.version": 3,
        "featserve.rows": 4,
        "featserve.rows.not_found": 1,
        "featserve.rows.expired": 1,
        "featserve.values.null": 2,
    }
    assert tree.names == [FIRST[transport], *STAGES]
    times = [(s.start_time_unix_nano, s.end_time_unix_nano) for s in tree.stages]
    assert [start for start, _ in times[1:]] == [stop for _, stop in times[:-1]]
    assert (times[0][0], times[-1][1]) == (span.start_time_unix_nano, span.end_time_unix_nano)
    assert before_ns - 5_000_000 <= times[0][0] <= times[-1][1] <= after_ns + 5_000_000  # two readings of two clocks


def test_the_caller_decides_and_chance_only_where_it_does_not(
    transport: str, tmp_path: Path, collector: Collector
) -> None:
    """A sampled caller is traced at ratio 0 and one that is not sampled never is; a broken header counts for none."""
    with watched(tmp_path / "p", transport, otlp_endpoint=collector.endpoint, sample_ratio=1) as server:
        asked(server, wide(1), traced("00"))
        asked(server, wide(1, 2), (("traceparent", "00-zz-1-01"),))
        asked(server, wide(1, 2, 3), ())
        asked(server, wide(1, 2, 3, 4), traced("03"))
        assert server.stop() == 0
    trees = collector.trees(3)
    assert [t.attributes["featserve.rows"] for t in trees] == [2, 3, 4]
    assert [t.span.trace_id.hex() == TRACE for t in trees] == [False, False, True]
    assert all(t.span.parent_span_id == b"" for t in trees[:2])
    assert len({t.span.trace_id for t in trees}) == 3


def test_a_context_is_found_among_other_metadata(transport: str, tmp_path: Path, collector: Collector) -> None:
    """Bytes, a key that stands twice and kilobytes of text before it harm neither a call nor its trace."""
    bulk = tuple((f"text-{i}", f"{i}" * 1_000) for i in range(6))
    headers: Headers = (("raw-bin", bytes(range(256))), ("twice", "first"), ("twice", "second"), *bulk, *traced())
    with watched(tmp_path / "p", transport, otlp_endpoint=collector.endpoint, sample_ratio=0) as server:
        assert asked(server, wide(1, 2), headers).rows == 2
        with server.stub() as stub:
            assert stub.WriteRows(numbers([1], 1.0), metadata=headers).rows == 1
        trees = collector.trees(2)
    assert {(t.span.trace_id.hex(), t.span.parent_span_id.hex()) for t in trees} == {(TRACE, PARENT)}


def test_errors_are_told_and_those_of_the_server_marked(transport: str, tmp_path: Path, collector: Collector) -> None:
    """A span has the status code and the reason of its error; it is an error where the server is at fault."""
    with watched(tmp_path / "p", transport, otlp_endpoint=collector.endpoint, sample_ratio=1) as server:
        with server.stub() as stub:
            stub.WriteRows(activity(1, now_us()))
            for request in (pb.GetFeaturesRequest(service="nope"), wide(), scored(1, by=666.0)):
                with pytest.raises(grpc.RpcError):
                    stub.GetFeatures(request)
        _, unknown, empty, failed = collector.trees(4)
    told = [(t.attributes["rpc.response.status_code"], t.attributes["error.type"]) for t in (unknown, empty, failed)]
    assert told == [
        ("NOT_FOUND", "UNKNOWN_NAME"), ("INVALID_ARGUMENT", "INVALID_REQUEST"), ("INTERNAL", "TRANSFORM_FAILED")
    ]  # fmt: skip
    assert [t.span.status.code for t in (unknown, empty, failed)] == [0, 0, 2]
    assert failed.span.status.message == "transform scaled@1 failed: ValueError: by is 666"
    assert unknown.names[1:] == ["decode", "plan"]
    assert failed.names[-1] == "transform scaled@1"
    assert failed.attributes["featserve.service.version"] == 3


def test_writes_and_messages_of_streams_are_requests(transport: str, tmp_path: Path, collector: Collector) -> None:
    """Each message of a stream has a span of its own, and a write says how long it waited for its turn."""
    with watched(tmp_path / "p", transport, otlp_endpoint=collector.endpoint, sample_ratio=0) as server:
        with server.stub() as stub:
            stub.WriteRows(numbers([1, 2], 1.0), metadata=traced())
            rows = (pb.StreamRowsRequest(request=numbers([n], 1.0)) for n in (3, 4))
            stub.StreamRows(rows, metadata=traced())
            requests = [wide(1), pb.GetFeaturesRequest(service="nope"), wide(1, 2, 3)]
            list(stub.StreamFeatures((pb.StreamFeaturesRequest(request=r) for r in requests), metadata=traced()))
        write, *streamed, first, wrong, last = collector.trees(6)
    assert write.span.name == f"{METHOD}WriteRows"
    assert write.names[-4:] == ["queue", "decode", "rows", "store write"]
    assert (write.attributes["featserve.view"], write.attributes["featserve.rows"]) == ("numbers@1", 2)
    assert [(t.span.name, t.attributes["featserve.rows"]) for t in streamed] == [(f"{METHOD}StreamRows", 1)] * 2
    assert [t.attributes["rpc.response.status_code"] for t in (first, wrong, last)] == ["OK", "NOT_FOUND", "OK"]
    assert [t.attributes.get("featserve.rows") for t in (first, wrong, last)] == [1, None, 3]
    assert {t.span.parent_span_id.hex() for t in (write, *streamed, first, wrong, last)} == {PARENT}


def test_pushes_are_requests(transport: str, tmp_path: Path, collector: Collector) -> None:
    """A push, and each message of a stream of them, is a span with its stages below that of the client's caller."""
    tracer = TracerProvider(shutdown_on_exit=False).get_tracer("orders")
    with watched(tmp_path / "p", transport, otlp_endpoint=collector.endpoint, sample_ratio=0) as server:
        server.apply(VISITS)
        with server.client() as client, tracer.start_as_current_span("order") as caller:
            client.push("visits", {"user_id": [1]}, event_time=[now_us()])
            client.push_stream("visits", [{"user_id": [user]} for user in (1, 2)], event_time=[now_us()])
        trees = collector.trees(5)
    context = caller.get_span_context()
    for tree in trees:
        assert tree.span.trace_id == context.trace_id.to_bytes(16, "big")
        assert tree.span.parent_span_id == context.span_id.to_bytes(8, "big")
    pushed = [tree for tree in trees if not tree.span.name.endswith("DescribeEvents")]
    names = ["PushEvents", "StreamEvents", "StreamEvents"]
    assert [tree.span.name for tree in pushed] == [f"{METHOD}{name}" for name in names]
    assert [tree.names[-3:] for tree in pushed] == [["decode", "events", "store write"]] * 3
    keys = ("source", "events", "events.counted", "events.late")
    assert [tuple(tree.attributes[f"featserve.{key}"] for key in keys) for tree in pushed] == [("visits", 1, 1, 0)] * 3


def test_a_write_that_is_passed_on_is_one_trace(transport: str, tmp_path: Path, collector: Collector) -> None:
    """The writer's span lies below the worker's, whose draw or caller decides for both, recorded or not."""
    with watched(
        tmp_path / "p", transport, {"workers": 2}, otlp_endpoint=collector.endpoint, sample_ratio=0.5
    ) as server:
        with server.stub() as stub:
            for user in range(40):
                stub.WriteRows(numbers([user], 1.0))
            stub.WriteRows(numbers([1], 1.0), metadata=traced("00"))
            stub.WriteRows(numbers([1], 1.0), metadata=traced(tracestate="vendor=1"))
        assert server.stop() == 0
    spans = {tree.span.span_id: tree for tree in collector.trees(2)}
    below = [tree for tree in spans.values() if tree.span.parent_span_id in spans]
    above = [spans[tree.span.parent_span_id] for tree in below]
    assert len(spans) == 2 * len(below) < 80
    assert all("store write" in low.names and "forward" in high.names for low, high in zip(below, above, strict=True))
    assert all(low.span.trace_id == high.span.trace_id for low, high in zip(below, above, strict=True))
    told = [(low.span.trace_state, high.span.parent_span_id.hex()) for low, high in zip(below, above, strict=True)]
    assert told.count(("vendor=1", PARENT)) == 1
    assert {each for each in told if each[0] == ""} == {("", "")}


def test_the_environment_says_where_to_send_and_who_it_is(
    transport: str, tmp_path: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenTelemetry's own variables count: the endpoint, the service's name, and attributes of the resource."""
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.endpoint)
    monkeypatch.setenv("OTEL_SERVICE_NAME", "features-eu")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    with watched(tmp_path / "p", transport, sample_ratio=1) as server:
        asked(server, wide(1), ())
        collector.trees(1)
    assert collector.resource["service.name"] == "features-eu"
    assert collector.resource["deployment.environment.name"] == "test"


@pytest.mark.parametrize("hangs", [True, False])
def test_no_request_waits_for_the_collector(
    transport: str, tmp_path: Path, hangs: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While one export goes on, held by a collector that never answers or tried again as there is none, all goes on.

    More requests are answered than the queue of spans holds, and the server stops, before that export gives up.
    """
    monkeypatch.setenv("OTEL_BSP_MAX_QUEUE_SIZE", "64")
    monkeypatch.setenv("OTEL_BSP_MAX_EXPORT_BATCH_SIZE", "32")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_TIMEOUT", "600")

    def logged(start: str) -> bool:
        return any(event["message"].startswith(start) for event in server.events())

    with Collector(hangs=hangs) as collector:
        if not hangs:
            collector.close()
        with watched(tmp_path / "p", transport, otlp_endpoint=collector.endpoint, sample_ratio=1) as server:
            with server.stub() as stub:
                stub.GetFeatures(wide(1), timeout=PATIENCE_S)
                until("an export goes on", lambda: collector.holds() if hangs else logged("Transient error"))
                for _ in range(200):  # 1,600 spans
                    stub.GetFeatures(wide(1), timeout=PATIENCE_S)
                assert collector.holds() if hangs else not logged("Failed to export")
            assert server.stop() == 0
    assert collector.calls == hangs


@pytest.mark.slow
def test_a_collector_that_comes_back_is_sent_spans_again(transport: str, tmp_path: Path) -> None:
    """Spans are sent to a collector that was not there when the server started."""
    with Collector() as gone:
        port = gone.port
    with watched(tmp_path / "p", transport, otlp_endpoint=f"http://127.0.0.1:{port}", sample_ratio=1) as server:
        asked(server, wide(1), ())
        with Collector(port=port) as collector, server.stub() as stub:
            until("a span has come", lambda: stub.GetFeatures(wide(1)) and collector.spans)


def begin(tracing: Tracing, *headers: tuple[str, str]) -> bool:
    return tracing.begin((("user-agent", "test"), *headers)) is not None


@pytest.mark.parametrize(
    ("header", "recorded"),
    [
        (f"00-{TRACE}-{PARENT}-01", True),
        (f"00-{TRACE}-{PARENT}-00", False),
        (f"00-{TRACE}-{PARENT}-ff", True),
        (f"00-{TRACE}-{PARENT}-02", False),
        (f"cc-{TRACE}-{PARENT}-01-what-the-future-adds", True),
        (f"cc-{TRACE}-{PARENT}-01", True),
        (f"00-{TRACE}-{PARENT}-01-more", None),
        (f"ff-{TRACE}-{PARENT}-01", None),
        (f"cc-{TRACE}-{PARENT}-01more", None),
        (f"00-{'0' * 32}-{PARENT}-01", None),
        (f"00-{TRACE}-{'0' * 16}-01", None),
        (f"00-{TRACE.upper()}-{PARENT}-01", None),
        (f"00-{TRACE}-{PARENT}-1", None),
        (f"00-{TRACE}-{PARENT}-01\n", None),
        (f"00-{TRACE}{PARENT}-01", None),
        ("", None),
        ("00", None),
    ],
)
def test_traceparents_are_read_as_the_standard_says(header: str, recorded: bool | None) -> None:
    """A valid header decides by its sampled bit; one that is not valid (None) decides nothing."""
    for ratio in (0.0, 1.0):
        tracing = Tracing(TelemetryConfig(sample_ratio=ratio), exporter=InMemorySpanExporter())
        assert begin(tracing, ("traceparent", header)) is (recorded if recorded is not None else ratio == 1)
        tracing.close(10)


def test_the_ratio_is_kept(seed: int) -> None:
    """Of many requests, the declared part is recorded, to within five standard deviations."""
    for ratio in (0.0, 0.01, 0.25, 1.0):
        tracing = Tracing(TelemetryConfig(sample_ratio=ratio), exporter=InMemorySpanExporter(), chance=Random(seed))
        requests = 20_000
        recorded = sum(begin(tracing) for _ in range(requests))
        assert abs(recorded - requests * ratio) <= 5 * (requests * ratio * (1 - ratio)) ** 0.5
        tracing.close(10)


def test_each_of_several_streams_has_the_caller_of_its_own(
    transport: str, tmp_path: Path, collector: Collector
) -> None:
    """Messages of two streams that come in turns are traced below the caller of each."""
    callers = [f"{i:032x}" for i in (1, 2)]
    with watched(tmp_path / "p", transport, otlp_endpoint=collector.endpoint, sample_ratio=0) as server:
        with server.stub() as stub:
            asking: list[SimpleQueue[pb.StreamFeaturesRequest | None]] = [SimpleQueue() for _ in callers]
            answers = [
                stub.StreamFeatures(iter(queue.get, None), metadata=(("traceparent", f"00-{caller}-{PARENT}-01"),))
                for caller, queue in zip(callers, asking, strict=True)
            ]
            for _ in range(3):
                for rows, (queue, answered) in enumerate(zip(asking, answers, strict=True), 1):
                    queue.put(pb.StreamFeaturesRequest(request=wide(*range(rows))))
                    assert next(answered).response.rows == rows
            for queue in asking:
                queue.put(None)
        trees = collector.trees(6)
    found = [(tree.span.trace_id, tree.attributes["featserve.rows"]) for tree in trees]
    assert sorted(found) == sorted(3 * [(bytes.fromhex(caller), rows) for rows, caller in enumerate(callers, 1)])


def test_a_request_that_is_not_recorded_makes_nothing() -> None:
    """Without a draw in its favour, a request gets no record, no stages and no span."""
    exporter = InMemorySpanExporter()
    tracing = Tracing(TelemetryConfig(sample_ratio=0), exporter=exporter)
    telemetry = Telemetry(tracing)
    for _ in range(100):
        call = Call((("traceparent", f"00-{TRACE}-{PARENT}-00"),), 1.0)
        with telemetry.watch("GetFeatures", call) as watch:
            assert (watch, call.record) == (None, None)
        assert telemetry.watch("GetFeatures", call) is UNWATCHED
    tracing.close(10)
    assert exporter.get_finished_spans() == ()


def test_who_is_answered_with_others_is_traced_as_if_alone(tmp_path: Path, rng: np.random.Generator) -> None:
    """The span of each says the same of its own rows, and how many were answered; its stages are those of all."""
    exporter = InMemorySpanExporter()
    tracing = Tracing(TelemetryConfig(sample_ratio=1), exporter=exporter)
    telemetry, draw = Telemetry(tracing), partial(tracing.begin, ())
    pairs: list[tuple[Trace, Trace, int]] = []
    known = 0
    with featserve.open(Project.make(tmp_path / "p").folder, write=True) as opened:
        service = Service(opened.engine, Limits(10_000, 60_000_000), now_us)
        for write in (numbers(range(4), 1.0), activity(1, now_us()), activity(2, now_us() - 2 * HOUR_US)):
            service.write_rows(write.SerializeToString(), Call())
        for _ in range(100):
            make, there = (wide, ranking)[rng.integers(2)], rng.random() < 0.8
            users, rows = rng.integers(0, 3 if there else 6, rng.integers(1, 8)).tolist(), 1 if there else 2
            bodies = [make(*[user] * rows).SerializeToString() for user in users]
            calls = [(1_000 + i, draw() if rng.random() < 0.5 else None) for i in range(len(bodies))]
            (share,) = service.shares(bodies)
            stages = Stages(("decode", 2_000))
            matrix, _ = service.get_features_together(share, stages)
            trace_together("GetFeatures", share, matrix, calls, stages)
            known += matrix is None
            for (taken_ns, trace), body in zip(calls, bodies, strict=True):
                if trace is not None:
                    assert trace.stages.begun[:2] == [("queue", taken_ns), ("decode", 2_000)]
                    assert trace.stages.begun[2:] == stages.begun[1:]
                    alone = draw()
                    assert alone is not None
                    pairs.append((trace, alone, len(bodies)))
                    with telemetry.watch("GetFeatures", call := Call(), (time.perf_counter_ns(), alone)):
                        service.get_features_alone(body, call)
    tracing.close(10)
    assert 0 < known < 100
    ended = {each[-1].trace_id: each for each in map(spans_of, exporter.get_finished_spans())}
    for trace, alone, count in pairs:
        told, expected = (list(ended[each.ids.trace_id][-1].attributes) for each in (trace, alone))
        together = told.pop()
        assert (together.key, together.value.int_value, told) == ("featserve.together", count, expected)
        names = [span.name for span in ended[trace.ids.trace_id]]
        missing = {span.name for span in ended[alone.ids.trace_id]} - set(names)
        assert missing <= {"plan"} if "encode" in names else names[-2] == "known answers"
    assert len(pairs) > 50


def test_times_are_those_of_the_stopwatch() -> None:
    """A stage that took 20 ms is a span of 20 ms or a little more, at the time of day that it ran."""
    exporter = InMemorySpanExporter()
    tracing = Tracing(TelemetryConfig(sample_ratio=1), exporter=exporter)
    before_ns = time.time_ns()
    trace = tracing.begin(())
    assert trace is not None
    trace.stages.begin("first")
    time.sleep(0.02)
    trace.stages.begin("second")
    trace.stages.end()
    trace.end("request", {"a": 1}.copy, None)
    tracing.close(10)
    first, second, request = spans(exporter)
    assert (first.name, second.name, request.name) == ("first", "second", "request")
    assert first.end_time_unix_nano - first.start_time_unix_nano >= 20_000_000
    assert before_ns - 1_000_000 <= first.start_time_unix_nano < time.time_ns()
    assert request.start_time_unix_nano == first.start_time_unix_nano
    assert request.end_time_unix_nano == second.end_time_unix_nano
    assert first.parent_span_id == second.parent_span_id == request.span_id


def test_spans_are_encoded_as_protobuf_does(seed: int) -> None:
    """What is put together by hand says the same as the protocol's own message, for names and states of any length."""
    draw = Random(seed)

    def text(longest: int) -> str:
        return "".join(draw.choices("aé€-1", k=draw.randint(0, longest)))

    for _ in range(300):
        exporter = InMemorySpanExporter()
        tracing = Tracing(TelemetryConfig(sample_ratio=1), exporter=exporter)
        state = draw.choice(["", "vendor=1", f"vendor={'x' * draw.randint(1, 250)}"])
        trace = tracing.begin(draw.choice([(), traced(tracestate=state)]))
        assert trace is not None
        names = [text(300) for _ in range(draw.randint(1, 12))]
        for name in names:
            trace.stages.begin(name)
        trace.stages.end()
        values: list[str | int] = [text(300), draw.getrandbits(40), 0]
        attributes = {text(50): draw.choice(values) for _ in range(draw.randint(0, 5))}
        failure = draw.choice([None, text(2_000)])
        trace.end(text(200), attributes.copy, failure)
        tracing.close(10)
        *stages, server = spans(exporter)
        times = [at for _, at in trace.stages.begun] + [trace.stages.ended_ns]
        first_ns = server.start_time_unix_nano - times[0]
        timed = zip(names, pairwise(times), strict=True)
        said = [(name, begun + first_ns, ended + first_ns) for name, (begun, ended) in timed]
        assert [(s.name, s.start_time_unix_nano, s.end_time_unix_nano) for s in stages] == said
        assert len({s.span_id for s in (*stages, server)}) == len(names) + 1
        for span in stages:
            expected = Span(
                trace_id=trace.ids.trace_id, span_id=span.span_id, parent_span_id=trace.ids.span_id,
                trace_state=trace.ids.state,
                flags=LOCAL, name=span.name, kind=Span.SPAN_KIND_INTERNAL,
                start_time_unix_nano=span.start_time_unix_nano, end_time_unix_nano=span.end_time_unix_nano,
            )  # fmt: skip
            assert span == expected
        assert (server.trace_id, server.span_id, server.parent_span_id) == trace.ids[:3]
        assert (server.flags, server.kind) == (REMOTE if trace.ids.parent_id else LOCAL, Span.SPAN_KIND_SERVER)
        assert (server.trace_state, server.end_time_unix_nano) == (trace.ids.state, times[-1] + first_ns)
        told = {pair.key: getattr(pair.value, str(pair.value.WhichOneof("value"))) for pair in server.attributes}
        assert told == attributes
        assert (server.status.code, server.status.message) == ((0, "") if failure is None else (2, failure))


def test_an_error_that_is_no_text_is_told() -> None:
    """A message that UTF-8 cannot hold is told as far as it can, and its request fails with nothing else."""
    exporter = InMemorySpanExporter()
    telemetry = Telemetry(Tracing(TelemetryConfig(sample_ratio=1), exporter=exporter))
    with pytest.raises(ServingError, match="half"), telemetry.watch("GetFeatures", Call()):
        raise ServingError("half \ud83d of a pair")
    telemetry.close()
    (_, request) = spans(exporter)
    assert request.status.message == "half ? of a pair"


def spans(exporter: InMemorySpanExporter) -> list[Span]:
    """Return the spans of the one request that has ended."""
    (ended,) = exporter.get_finished_spans()
    return spans_of(ended)


def spans_of(ended: Any) -> list[Span]:
    assert isinstance(ended, Trace)
    return list(ScopeSpans.FromString(ended.spans()).spans)
