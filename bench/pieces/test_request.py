"""A request: its plan, its message, the engine, and the whole of it in process."""

from __future__ import annotations

from pytest_benchmark.fixture import BenchmarkFixture

from bench.pieces.served import NOW_US, Served
from featserve._proto import serving_pb2 as pb
from featserve.plan import Plans
from featserve.server.service import Call, Limits, Service
from featserve.wire import decode_keys, encode_column, encode_matrix, parse


def message(served: Served, count: int) -> bytes:
    """Return the bytes of a GetFeaturesRequest."""
    columns = [encode_column(name, column) for name, column in served.keys(count).columns.items()]
    return pb.GetFeaturesRequest(service="score", keys=columns).SerializeToString()


def test_compile_plans(benchmark: BenchmarkFixture, served: Served) -> None:
    """Compile the plans of a snapshot of one view and one service."""
    assert benchmark(Plans, served.snapshot).service("score").schema.width == 50


def test_decode_request(benchmark: BenchmarkFixture, served: Served, count: int) -> None:
    """Parse a request and check its keys."""
    data, expected = message(served, count), served.plans.service("score").schema.keys
    keys = benchmark(lambda: decode_keys(parse(pb.GetFeaturesRequest, data).keys, expected, 10_000))
    assert keys.count == count


def test_read(benchmark: BenchmarkFixture, served: Served, count: int) -> None:
    """Read checked keys into a matrix: encode them, read the store, decode the rows."""
    engine, plan, keys = served.engine, served.plans.service("score"), served.keys(count)
    assert len(benchmark(engine.read, plan, keys, NOW_US)) == count


def test_encode_answer(benchmark: BenchmarkFixture, served: Served, count: int) -> None:
    """Turn a matrix into the bytes of an answer."""
    matrix = served.engine.read(served.plans.service("score"), served.keys(count), NOW_US)
    data = benchmark(lambda: encode_matrix(matrix).SerializeToString())
    assert len(data) < 400 + 204 * count


def test_whole_request(benchmark: BenchmarkFixture, served: Served, count: int) -> None:
    """Answer a request, from its bytes to those of the answer, without a transport."""
    service = Service(served.engine, Limits(10_000, 0), lambda: NOW_US)
    data, call = message(served, count), Call((), 5.0)
    assert len(benchmark(service.get_features, data, call)) > 200 * count
