"""Metrics: the page at ``http://HOST:PORT/metrics`` that Prometheus reads, made by OpenTelemetry's SDK and exporter.

Comes in: a server's counters and its store. Nothing is computed until the page is asked for, and then in the thread of
its own server. Names and units are OpenTelemetry's, which the exporter turns into Prometheus' own.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from threading import Thread
from typing import Any
from wsgiref.simple_server import make_server

from opentelemetry.exporter.prometheus import PrometheusMetricReader
from opentelemetry.metrics import CallbackOptions, Observation
from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Histogram,
    HistogramDataPoint,
    Metric,
    MetricsData,
    ResourceMetrics,
    ScopeMetrics,
)
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from prometheus_client import CollectorRegistry, make_wsgi_app
from prometheus_client.exposition import ThreadingWSGIServer, _SilentHandler

from featserve.errors import ServingError
from featserve.matrix import Status
from featserve.server.meter import SECOND, Buckets, Meter
from featserve.server.service import SERVICE_NAME
from featserve.store import OnlineStore
from featserve.store.follow import Follower

SCOPE = "featserve"
US_PER_SECOND = 1_000_000

Points = Iterable[tuple[dict[str, str], float]]


class Page:
    """The page, at ``address``, until it is closed."""

    def __init__(
        self,
        meter: Meter,
        store: OnlineStore,
        follower: Follower | None,
        resource: Mapping[str, str],
        host: str,
        port: int,
    ) -> None:
        """Listen. Raises ServingError where the address cannot be had.

        ``follower``: lets the store catch up, where another process writes it. ``resource``: what OpenTelemetry calls
        this process.
        """
        registry = CollectorRegistry()
        reader = _Reader(meter, registry)
        self._provider = MeterProvider([reader], Resource.create(resource), shutdown_on_exit=False)
        _observe(self._provider.get_meter(SCOPE), meter, store, follower)
        try:
            # In a restart the next worker listens before the last one has gone.
            kind = _SharedServer if "service.instance.id" in resource else ThreadingWSGIServer
            self._server = make_server(host, port, make_wsgi_app(registry), kind, _SilentHandler)
        except OSError as error:
            raise ServingError(
                f"cannot listen on {host}:{port} for metrics: {error.strerror}. Choose another [telemetry] "
                "prometheus_port"
            ) from error
        self.address = f"{host}:{self._server.server_port}"
        self._thread = Thread(target=self._server.serve_forever, name="featserve-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
        self._provider.shutdown()


class _SharedServer(ThreadingWSGIServer):
    """One that another process may listen beside."""

    allow_reuse_port = True


def _observe(to: Any, meter: Meter, store: OnlineStore, follower: Follower | None) -> None:
    """Declare the instruments, each of which is observed when the page is asked for."""

    def counter(name: str, unit: str, description: str, points: Callable[[], Points]) -> None:
        to.create_observable_counter(name, [_observed(points)], unit, description)

    def gauge(name: str, unit: str, description: str, points: Callable[[], Points]) -> None:
        to.create_observable_gauge(name, [_observed(points)], unit, description)

    gauge("featserve.requests.active", "{request}", "Calls under way", lambda: _loads(meter, "active"))
    counter("featserve.requests.shed", "{request}", "Calls refused as too many were", lambda: _loads(meter, "shed"))
    counter("featserve.rows.read", "{row}", "Rows asked for", lambda: _rows_read(meter))
    counter("featserve.view.rows", "{row}", "Rows asked of a view, by what it had", lambda: _rows_by_status(meter))
    counter("featserve.view.nulls", "{value}", "Null values in the rows that a view had", lambda: _nulls(meter))
    counter("featserve.rows.written", "{row}", "Rows written", lambda: _written(meter, 0))
    counter("featserve.rows.stored", "{row}", "Rows written that were the newest", lambda: _written(meter, 1))
    counter("featserve.events.pushed", "{event}", "Events pushed, by what became of them", lambda: _pushed(meter))
    gauge("featserve.store.size", "By", "What the store takes on disk", lambda: [({}, store.size_bytes())])
    lag_s: Callable[[], float] = (lambda: 0.0) if follower is None else follower.lag_s
    gauge("featserve.store.lag", "s", "How long ago it last caught up with its writer", lambda: [({}, lag_s())])
    counter("featserve.store.lookups", "{lookup}", "Look-ups in the store's caches", lambda: _lookups(store))


def _observed(points: Callable[[], Points]) -> Callable[[CallbackOptions], Iterable[Observation]]:
    return lambda options: [Observation(value, attributes) for attributes, value in points()]


def _loads(meter: Meter, what: str) -> Points:
    return [({}, sum(getattr(load, what) for load in meter.loads))]


def _rows_read(meter: Meter) -> Points:
    return [({"featserve.service": t.schema.reference}, t.rows) for t in list(meter.tallies.values())]


def _rows_by_status(meter: Meter) -> Points:
    for tally in list(meter.tallies.values()):
        for i, view in enumerate(tally.schema.views):
            absent = {Status.NOT_FOUND: tally.not_found[i], Status.EXPIRED: tally.expired[i]}
            counts = {Status.PRESENT: tally.rows - sum(absent.values())} | absent
            labels = {"featserve.service": tally.schema.reference, "featserve.view": view.id}
            yield from ((labels | {"featserve.status": s.name.lower()}, count) for s, count in counts.items())


def _nulls(meter: Meter) -> Points:
    for tally in list(meter.tallies.values()):
        for view, nulls in zip(tally.schema.views, tally.nulls, strict=True):
            yield {"featserve.service": tally.schema.reference, "featserve.view": view.id}, nulls


def _written(meter: Meter, which: int) -> Points:
    return [({"featserve.view": view}, rows[which]) for view, rows in list(meter.written.items())]


def _pushed(meter: Meter) -> Points:
    for source, outcomes in list(meter.pushed.items()):
        for outcome, events in list(outcomes.items()):
            yield {"featserve.source": source, "featserve.outcome": outcome}, events


def _lookups(store: OnlineStore) -> Points:
    for cache, counts in store.cache_lookups().items():
        for result, count in zip(("hit", "miss"), counts, strict=True):
            yield {"featserve.cache": cache, "featserve.result": result}, count


class _Reader(PrometheusMetricReader):
    """Adds a meter's histograms to what the SDK hands to the exporter: it has no instrument that observes one."""

    def __init__(self, meter: Meter, registry: CollectorRegistry) -> None:
        super().__init__(scope_info_enabled=False, registry=registry)
        self._meter, self._started_ns = meter, time.time_ns()

    def _receive_metrics(self, metrics_data: MetricsData, timeout_millis: float = 10_000, **kwargs: Any) -> None:
        observed = metrics_data.resource_metrics
        ours = ScopeMetrics(InstrumentationScope(SCOPE), self._histograms(), "")
        added = ResourceMetrics(observed[0].resource, [ours], "")
        super()._receive_metrics(MetricsData([*observed, added]), timeout_millis, **kwargs)

    def _histograms(self) -> list[Metric]:
        durations = [
            self._point(buckets, SECOND, self._call(*key)) for key, buckets in list(self._meter.durations.items())
        ]
        ages = [
            self._point(buckets, US_PER_SECOND, {"featserve.view": view})
            for view, buckets in list(self._meter.ages.items())
        ]
        return [
            _metric(
                "rpc.server.call.duration",
                "How long requests took from being taken on to the answer, each message of a stream being one, "
                "and those refused at once no time",
                durations,
            ),
            _metric("featserve.view.age", "How old served rows were, looked at in up to 4 answers a second", ages),
            _metric(
                "featserve.event_loop.delay",
                "How late the event loop came to a task, and how long pygrpc-native's thread has been at its turn, "
                "looked at ten times a second",
                [self._point(self._meter.loop_delay, SECOND, {})],
            ),
        ]

    def _call(self, method: str, service: str, code: str) -> dict[str, str]:
        """Return the attributes of a request, as OpenTelemetry's conventions name them."""
        tally = self._meter.tallies.get(service)
        return {
            "rpc.system.name": "grpc",
            "rpc.method": f"{SERVICE_NAME}/{method}",
            "rpc.response.status_code": code,
            "featserve.service": "" if tally is None else tally.schema.reference,
        }

    def _point(self, buckets: Buckets, units_per_second: int, attributes: dict[str, str]) -> HistogramDataPoint:
        counts = list(buckets.counts)
        return HistogramDataPoint(
            attributes,
            self._started_ns,
            time.time_ns(),
            sum(counts),
            buckets.sum / units_per_second,
            counts,
            [bound / units_per_second for bound in buckets.bounds],
            min=float("inf"),
            max=float("-inf"),
        )


def _metric(name: str, description: str, points: list[HistogramDataPoint]) -> Metric:
    return Metric(name, description, "s", Histogram(points, AggregationTemporality.CUMULATIVE))
