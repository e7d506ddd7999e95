"""What is told of a request beyond its answer: its stages, their explanation, and the trace that it is a part of."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.trace import (
    NonRecordingSpan,
    SpanContext,
    TraceFlags,
    TraceState,
    use_span,
)

import featserve
from featserve.config import Config, TelemetryConfig, load_config
from featserve.errors import DefinitionError
from featserve.stages import Stage, Stages
from tests.command_line import run
from tests.server.collector import Collector
from tests.server.messages import activity, now_us, weather
from tests.server.watched import WITH_TRANSFORMS, watched
from tests.serving import Project, Server

pytest_plugins = ["tests.served"]

KEYS = {"user_id": [1, 2], "country": ["de", "de"], "zip": ["10115", "10115"]}
REQUEST = {"by": [2.0, 3.0]}
READ = ["plan", "keys", "store read", "codec activity@1", "codec weather@1", "transform scaled@1", "place"]


@pytest.fixture(scope="module")
def collector(transport: str) -> Iterator[Collector]:
    """Give each transport a collector of its own."""
    with Collector() as collector:
        yield collector


@pytest.fixture(scope="module")
def server(transport: str, tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[Server]:
    """Run a server that traces callers who trace, and holds a row of each view."""
    folder = tmp_path_factory.mktemp("telemetry") / "p"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
        server = watched(folder, transport, otlp_endpoint=collector.endpoint, sample_ratio=0)
    with server:
        with server.stub() as stub:
            stub.WriteRows(activity(1, now_us()))
            stub.WriteRows(weather("de", "10115", 20.5, 3.25))
        yield server


def check(stages: list[Stage], names: list[str]) -> None:
    """Check that stages have these names, begin at 0 and follow one another without a gap."""
    assert [stage.name for stage in stages] == names
    ends = [stage.start_ns + stage.duration_ns for stage in stages]
    assert [0, *ends[:-1]] == [stage.start_ns for stage in stages]
    assert all(stage.duration_ns >= 0 for stage in stages)
    assert 0 < ends[-1] < 60e9


def test_stages_come_in_process_and_from_a_server(server: Server, tmp_path: Path) -> None:
    """A request tells its stages where that is asked for: the same ones in process, and from a server its encoding."""
    stages = Stages()
    with server.client() as client:
        plain = client.get("scored", KEYS, request=REQUEST)
        told = client.get("scored", KEYS, request=REQUEST, stages=stages)
    assert told.to_dict() == plain.to_dict()
    check(stages.timed(), [*READ, "encode"])
    Project.make(tmp_path / "p", WITH_TRANSFORMS)
    here = Stages()
    with featserve.open(tmp_path / "p", write=True) as project:
        project.get("scored", KEYS, request=REQUEST, stages=here)
    check(here.timed(), READ)


def test_stages_are_explained_as_a_tree(server: Server) -> None:
    """``get --explain`` prints each stage with its time, and which view version or transform made which feature."""
    words = ("scored", "user_id=1,2", "country=de", "zip=10115", "by=2,3", "--explain", "--server", server.address)
    text = run("get", *words).stdout
    tree = text[text.index("get scored@3") :]
    times = dict(re.findall(r"(\w[\w@. ]*?)  +([\d,.]+) µs", tree))
    assert {*READ, "encode", "network and client"} <= times.keys()
    total = float(times["get scored@3"].replace(",", ""))
    parts = sum(float(times[name].replace(",", "")) for name in (*READ, "encode", "network and client"))
    assert parts == pytest.approx(total, abs=0.1 * len(times))
    made = re.findall(r"(codec activity@1|codec weather@1|transform scaled@1) .*\n[│ ]*└── (.*)", tree)
    assert dict(made) == {
        "codec activity@1": "activity.score, activity.plan",
        "codec weather@1": "weather.temp",
        "transform scaled@1": "scaled.x",
    }


def test_stages_are_explained_as_json(server: Server) -> None:
    """With --json the explanation is one object, after those of the rows; without --explain there is none."""
    words = ("scored", "user_id=1,2", "country=de", "zip=10115", "by=2,3", "--json", "--server", server.address)
    *rows, last = map(json.loads, run("get", *words, "--explain").stdout.splitlines())
    assert [row["values"]["scaled.x"] for row in rows] == [3.0, None]
    explained = last["explain"]
    assert explained["service"] == "scored@3"
    assert [stage["name"] for stage in explained["stages"]] == [*READ, "encode"]
    assert sum(stage["duration_us"] for stage in explained["stages"]) <= explained["duration_us"]
    assert next(s["features"] for s in explained["stages"] if s["name"] == "codec weather@1") == ["weather.temp"]
    assert len(run("get", *words).stdout.splitlines()) == 2


def test_stages_of_a_project_are_explained_without_a_server(tmp_path: Path) -> None:
    """Without --server the stages are those of this process."""
    Project.make(tmp_path / "p", WITH_TRANSFORMS)
    featserve.open(tmp_path / "p", write=True).close()
    text = run("get", "wide", "user_id=7", "--explain", "-C", tmp_path / "p").stdout
    assert "in this process" in text
    assert re.search(r"codec numbers@1 .*\n.*numbers\.f0, numbers\.f1", text)


def test_the_servers_span_is_a_child_of_the_callers(server: Server, collector: Collector) -> None:
    """Inside a span of the caller, each call of the client carries its context: trace, parent, sampling and state."""
    provider = TracerProvider(shutdown_on_exit=False)
    tracer = provider.get_tracer("model server")
    with server.client() as client:
        client.get("wide", {"user_id": [1]})  # in no span: not traced
        before = len(collector.spans)
        with tracer.start_as_current_span("predict") as span:
            client.get("wide", {"user_id": [1, 2, 3]})
            client.write("weather", weather_row(), event_time="at")
            client.write_stream("weather", [weather_row()], event_time="at")
        context = span.get_span_context()
        unsampled = SpanContext(context.trace_id, context.span_id, False, TraceFlags(0))
        with use_span(NonRecordingSpan(unsampled)):
            client.get("wide", {"user_id": [1]})
        stated = SpanContext(1 << 100, 1 << 50, False, TraceFlags(1), TraceState([("vendor", "x")]))
        with use_span(NonRecordingSpan(stated)):
            client.get("wide", {"user_id": [1]})
    assert before == 0
    *inside, last = collector.trees(6)
    called = [tree.span.name.rpartition("/")[2] for tree in (*inside, last)]
    assert called == ["GetFeatures", "DescribeView", "WriteRows", "DescribeView", "StreamRows", "GetFeatures"]
    for tree in inside:
        assert tree.span.trace_id == context.trace_id.to_bytes(16, "big")
        assert tree.span.parent_span_id == context.span_id.to_bytes(8, "big")
    assert (last.span.trace_id, last.span.trace_state) == ((1 << 100).to_bytes(16, "big"), "vendor=x")


def weather_row() -> dict[str, list[object]]:
    at = now_us()
    return {"country": ["nz"], "zip": ["1"], "temp": [1.0], "wind": [2.0], "at": [at]}


def test_the_client_does_not_load_opentelemetry(server: Server) -> None:
    """A program that does not trace does not get OpenTelemetry loaded by the client, though it is installed."""
    code = (
        "import sys, featserve; featserve.connect(sys.argv[1], timeout=60).get('wide', {'user_id': [1]});"
        "print(any(name.startswith('opentelemetry') for name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, server.address], capture_output=True, text=True)
    assert (done.stdout.strip(), done.returncode) == ("False", 0), done.stderr


def load(folder: Path, text: str, **environment: str) -> TelemetryConfig:
    (folder / "featserve.toml").write_text(text)
    return load_config(folder, environment).telemetry


def test_telemetry_is_off_unless_asked_for(tmp_path: Path) -> None:
    """Without settings there is neither tracing nor a page of metrics; each key of the section is read."""
    assert Config(tmp_path).telemetry == TelemetryConfig(None, 0.01, "featserve", None)
    assert load(tmp_path, "") == TelemetryConfig()
    full = '[telemetry]\notlp_endpoint = "https://c:4317"\nsample_ratio = 1\nservice_name = "f"\nprometheus_port = 0\n'
    assert load(tmp_path, full) == TelemetryConfig("https://c:4317", 1, "f", 0)


def test_opentelemetrys_own_variables_win(tmp_path: Path) -> None:
    """The standard variables win over the file; an empty one is as none, as its standard says."""
    text = '[telemetry]\notlp_endpoint = "http://a:1"\nservice_name = "file"\n'
    given = {"OTEL_EXPORTER_OTLP_ENDPOINT": "http://b:2", "OTEL_SERVICE_NAME": "environment"}
    found = load(tmp_path, text, **given)
    assert (found.otlp_endpoint, found.service_name) == ("http://b:2", "environment")
    found = load(tmp_path, text, **dict.fromkeys(given, ""))
    assert (found.otlp_endpoint, found.service_name) == ("http://a:1", "file")


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ('otlp_endpoint = "localhost:4317"', r"otlp_endpoint: 'localhost:4317' is no URL as in http://localhost:4317"),
        ('otlp_endpoint = ""', r"\[telemetry\] otlp_endpoint: expected a text that is not empty"),
        ("sample_ratio = 1.5", r"\[telemetry\] sample_ratio: 1.5 is not from 0 to 1"),
        ("sample_ratio = true", r"\[telemetry\] sample_ratio: expected a number"),
        ("prometheus_port = 65536", r"\[telemetry\] prometheus_port: 65536 is not from 0 to 65,535"),
        ('prometheus_port = "9464"', r"\[telemetry\] prometheus_port: expected a whole number"),
        ("prometheus = 1", "unknown key in .telemetry.: 'prometheus'; did you mean 'prometheus_port'"),
    ],
)
def test_a_mistake_is_named(tmp_path: Path, text: str, complaint: str) -> None:
    """A wrong key, type, range or address is an error that names the key."""
    with pytest.raises(DefinitionError, match=complaint):
        load(tmp_path, f"[telemetry]\n{text}\n")
