"""What one on-demand transform adds to a request in process: the same service with it and without, in turns.

Comes in: nothing, as rows are in memory and the store's cost is the same for both. Goes out: the difference of the
medians, for a request of one row and for many.
"""

from __future__ import annotations

import gc
import time
from pathlib import Path

import numpy as np

from bench.report import Figure
from featserve.batch import EntityKeys, EventBatch
from featserve.definitions import (
    Entity,
    FeatureService,
    FeatureView,
    Field,
    OnDemandTransform,
    RequestColumn,
)
from featserve.definitions.code import MAIN, Code
from featserve.engine import NOTHING, encode_rows, read
from featserve.plan import compile_service, compile_view
from featserve.store.memory import MemoryStore
from featserve.types import Column, Float64, Int64, String

ROWS = 10_000
FEATURES = 10
CASES = ((1, 20_000, 15.0), (100, 4_000, None), (10_000, 60, None))
"""Rows of a request, requests of each kind, and the most microseconds that one transform may add to it."""

VIEW = FeatureView(
    "account",
    Entity("account", {"account_id": Int64}),
    [*(Field(f"f{i}", Float64) for i in range(FEATURES)), Field("country", String)],
)
TRANSFORMS = {
    "a ratio": OnDemandTransform(
        "ratio",
        {"amount": RequestColumn("amount", Float64), "mean": VIEW["f0"]},
        [Field("ratio", Float64)],
        Code("ratio", {MAIN: "def ratio(amount, mean):\n    return amount / mean\n"}),
    ),
    "text in and out": OnDemandTransform(
        "shout",
        {"country": VIEW["country"]},
        [Field("loud", String)],
        Code("shout", {MAIN: "import numpy as np\ndef shout(country):\n    return np.strings.upper(country)\n"}),
    ),
}


def measure(folder: Path) -> list[Figure]:
    """Return what each transform adds to requests of each size; ``folder`` is left alone."""
    store = _filled()
    plain = compile_service(FeatureService("plain", [VIEW], dtype=Float64))
    figures = []
    for name, transform in TRANSFORMS.items():
        computed = compile_service(FeatureService("computed", [VIEW, transform], dtype=Float64))
        for rows, requests, target in CASES:
            keys = EntityKeys({"account_id": Column(Int64, np.arange(rows))}, rows)
            amount = (
                {"amount": Column(Float64, np.full(rows, 3.5))} if "amount" in computed.schema.request_columns else {}
            )
            times = np.empty((2, requests))
            gc.collect()
            gc.disable()
            for i in range(requests):
                for side, (plan, request) in enumerate(((plain, NOTHING), (computed, amount))):
                    started = time.perf_counter_ns()
                    read(store, plan, keys, 1, request_columns=request)
                    times[side, i] = time.perf_counter_ns() - started
            gc.enable()
            without_us, with_us = np.median(times, axis=1) / 1_000
            figures.append(
                Figure(
                    f"{name}, {rows:,} {'row' if rows == 1 else 'rows'}: adds",
                    float(with_us - without_us),
                    "us",
                    target if name == "a ratio" else None,
                    at_most=True,
                    note=f"to {without_us:,.1f} us",
                )
            )
    return figures


def _filled() -> MemoryStore:
    """Return a store with a row of each entity."""
    random = np.random.default_rng(1)
    columns = {f"f{i}": Column(Float64, random.standard_normal(ROWS)) for i in range(FEATURES)}
    texts = np.frombuffer(b"nz" * ROWS, np.uint8)
    columns |= {
        "country": Column(String, texts, np.arange(0, 2 * ROWS + 1, 2)),
        "account_id": Column(Int64, np.arange(ROWS)),
    }
    times = np.zeros(ROWS, np.int64)
    store = MemoryStore()
    store.write_many(*encode_rows(compile_view(VIEW), EventBatch(columns, times, times, np.arange(ROWS))))
    return store
