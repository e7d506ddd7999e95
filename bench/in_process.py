"""The latency of ``featserve.open(...).get`` with no server, beside the store's own read of the same rows."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

import featserve
from bench.project import ENTITIES, KEY, SERVICE
from bench.report import Figure, number
from featserve.plan import ReadPlan

CASES = ((1, 20_000, 20.0), (10, 10_000, None), (100, 10_000, 400.0))
"""Keys, calls, and the p50 that was promised, in microseconds."""


def measure(folder: Path) -> list[Figure]:
    """Time calls for random entities, all of which were read before, each beside a bare read of as many others."""
    figures = []
    random = np.random.default_rng(3)
    with featserve.open(folder) as project:
        plan = project.engine.plans.service(SERVICE)
        for start in range(0, ENTITIES, 1_000):
            project.get(SERVICE, {KEY: np.arange(start, start + 1_000)})
        gc.collect()
        gc.freeze()
        for keys, calls, target in CASES:
            wanted = random.integers(0, ENTITIES, (calls, keys))
            others = random.integers(0, ENTITIES, (calls, keys))
            asked: list[Any] = [{KEY: row.tolist() if keys == 1 else row} for row in wanted]
            stored = [_stored_keys(plan, row) for row in others]
            get_us, read_us = _timed(
                lambda keys: project.get(SERVICE, keys), asked, project.engine.store.read_many, stored
            )
            name = f"{keys} {'key' if keys == 1 else 'keys'}"
            figures += [
                _figure(f"get, {name}: p50", get_us, target),
                _figure("  of that the store's read: p50", read_us, None),
            ]
    return figures


def _stored_keys(plan: ReadPlan, entities: Any) -> list[bytes]:
    (view,) = plan.views
    return [view.prefix + int(entity).to_bytes(8, "big") for entity in entities]


def _timed(
    first: Callable[[Any], object],
    first_arguments: list[Any],
    second: Callable[[Any], object],
    second_arguments: list[Any],
) -> tuple[Any, Any]:
    """Call both in turns; return the microseconds of each call."""
    times: tuple[list[int], list[int]] = ([], [])
    clock = time.perf_counter_ns
    for one, other in zip(first_arguments, second_arguments, strict=True):
        started = clock()
        first(one)
        middle = clock()
        second(other)
        times[0].append(middle - started)
        times[1].append(clock() - middle)
    return np.array(times[0]) / 1_000, np.array(times[1]) / 1_000


def _figure(name: str, times_us: Any, target_us: float | None) -> Figure:
    p50, p99 = np.percentile(times_us, (50, 99))
    return Figure(name, float(p50), "us", target_us, at_most=True, note=f"p99 {number(float(p99))} us")
