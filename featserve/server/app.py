"""The server's life: open the registry and the store, listen, follow the registry, drain.

Comes in: a configuration. Nothing goes out: ``run`` returns when the process was told to stop and all is closed.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress

import uvloop

from featserve.config import Config
from featserve.engine import Engine
from featserve.errors import FeatserveError
from featserve.plan import Plans
from featserve.registry import Registry
from featserve.server.forward import Forward
from featserve.server.grpcio import GrpcioServer, certificates
from featserve.server.service import Limits, Service
from featserve.server.telemetry import Telemetry
from featserve.server.transport import Transport, transport
from featserve.server.workers import Part, cores, supervise
from featserve.store import open_store
from featserve.store.follow import Follower

log = logging.getLogger("featserve.server")


def clock_us() -> int:
    """Return the machine's time, int64 microseconds since the Unix epoch."""
    return time.time_ns() // 1_000


def run(config: Config, ready: Callable[[str], None] = lambda address: None) -> None:
    """Serve until SIGTERM or SIGINT; ``ready`` is called with ``host:port`` once requests are taken.

    SIGHUP takes what was newly applied at once; otherwise the registry is looked at every
    ``registry_poll_seconds``. Raises StoreError, RegistryConflict, ServingError or DefinitionError where it cannot
    start; what is wrong with the transport or with TLS, before anything is opened.
    """
    transport(config.server)
    certificates(config.server)
    workers = config.server.workers or cores()
    if workers > 1:
        supervise(config, workers, ready)
    else:
        uvloop.run(serve(config, ready))


async def serve(config: Config, ready: Callable[[str], None], part: Part | None = None) -> None:
    """Serve in this process. ``part``: which of several it is."""
    follows = part is not None and not part.writes
    registry = Registry.open(config.registry.url)
    try:
        plans = Plans(registry.snapshot())
        store = open_store(
            config.store.path,
            "follow" if follows else "write",
            durability=config.store.durability,
            block_cache_mb=config.store.block_cache_mb,
            row_cache_mb=config.store.row_cache_mb,
            count_lookups=config.telemetry.prometheus_port is not None,
        )
        follower = Follower(store, config.store.catch_up_ms / 1_000) if follows else None
        try:
            telemetry = Telemetry.open(config, store, follower, part)
            try:
                await _serve(config, registry, Engine(store, plans, follower), telemetry, ready, part)
            finally:
                gc.unfreeze()  # whatever this process does afterwards, its end included, is collected as before
                telemetry.close()
        finally:
            if follower is not None:
                follower.close()
            store.close()
    finally:
        registry.close()
    log.info("stopped")


async def _serve(
    config: Config,
    registry: Registry,
    engine: Engine,
    telemetry: Telemetry,
    ready: Callable[[str], None],
    part: Part | None,
) -> None:
    stop, reload = asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    loop.add_signal_handler(signal.SIGHUP, reload.set)
    # What start-up made lives as long as the process: the collector need not walk it again.
    gc.collect()
    gc.freeze()
    server, forward, address = await _listen(config, engine, telemetry, part)
    snapshot = engine.plans.snapshot
    log.info(
        "serving",
        extra={"address": address, "revision": snapshot.revision, "services": sorted(snapshot.services)},
    )
    if not snapshot.services:
        log.warning("nothing is applied: run `featserve apply`; what it applies is served without a restart")
    ready(address)
    if part is not None:
        loop.add_reader(sys.stdin.fileno(), stop.set)  # the parent is gone, however it ended
    follower = asyncio.create_task(_follow(registry, engine, reload, config.server.registry_poll_seconds))
    loop_watcher = asyncio.create_task(telemetry.watch_loop())
    await stop.wait()
    log.info("draining", extra={"limit_seconds": config.server.drain_seconds})
    if part is not None:
        loop.remove_reader(sys.stdin.fileno())
    follower.cancel()
    loop_watcher.cancel()
    try:
        await server.drain(config.server.drain_seconds)
    finally:
        if forward is not None:
            await forward.close()


async def _listen(
    config: Config, engine: Engine, telemetry: Telemetry, part: Part | None
) -> tuple[Transport, Forward | None, str]:
    """Take requests; return the server, where it passes writes on to, and where it listens."""
    skew_us = int(config.server.max_future_skew_seconds * 1_000_000)
    limits = Limits(config.server.max_rows, skew_us, config.server.max_message_mb << 20)
    service = Service(engine, limits, clock_us)
    if part is not None and part.writes:
        writer = GrpcioServer(service, config.server, telemetry, for_workers=True)
        await writer.listen(f"unix:{part.socket}")
        return writer, None, str(part.socket)
    forward = None
    if part is not None:
        assert engine.follower is not None
        forward = Forward(part.socket, engine.store, engine.follower)
    server, host = transport(config.server)(service, config.server, telemetry, forward), config.server.host
    port = await server.start(host, config.server.port, reuse_port=part is not None)
    return server, forward, f"{host}:{port}"


async def _follow(registry: Registry, engine: Engine, reload: asyncio.Event, poll_seconds: float) -> None:
    """Take each new snapshot of the registry; requests that began with the old one end with it."""
    while True:
        with suppress(TimeoutError):
            await asyncio.wait_for(reload.wait(), poll_seconds)
        reload.clear()
        try:
            if await asyncio.to_thread(registry.revision) != engine.plans.snapshot.revision:
                engine.plans = await asyncio.to_thread(lambda: Plans(registry.snapshot()))
                snapshot = engine.plans.snapshot
                log.info(
                    "took a new snapshot", extra={"revision": snapshot.revision, "services": sorted(snapshot.services)}
                )
        except Exception as error:  # the top of a background loop
            trace = None if isinstance(error, FeatserveError) else error
            log.error("cannot follow the registry, still serving the old definitions: %s", error, exc_info=trace)
