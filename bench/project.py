"""The project that is measured: one view of 50 float64 features, one million entities, and a service of that view.

Comes in: a folder. Goes out: a Parquet file whose rows are in no order of their keys, and a project beside it.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import featserve
from featserve.config import load_config
from featserve.project import load_definitions
from featserve.registry import Registry

ENTITIES = 1_000_000
FEATURES = 50
VIEW = "account"
SERVICE = "score"
KEY = "account_id"
ROW_GROUP = 131_072

DEFINITIONS = f"""
from featserve import Entity, FeatureService, FeatureView, Field, Float64, Int64, ParquetSource

account = Entity("account", {{"{KEY}": Int64}})
view = FeatureView(
    "{VIEW}", account, [Field(f"f{{i}}", Float64) for i in range({FEATURES})],
    source=ParquetSource("accounts.parquet", event_time="event_time"),
)
service = FeatureService("{SERVICE}", [view])
"""


def make(folder: Path, entities: int = ENTITIES, seed: int = 1) -> None:
    """Write source and definitions to ``folder``, and apply them; the store stays empty."""
    folder.mkdir(parents=True, exist_ok=True)
    _write_source(folder / "accounts.parquet", entities, seed)
    (folder / "features.py").write_text(DEFINITIONS, encoding="utf-8")
    (folder / "featserve.toml").write_text("[server]\nport = 0\n", encoding="utf-8")
    config = load_config(folder)
    with Registry.open(config.registry.url) as registry:
        registry.apply(load_definitions(config), "bench", time.time_ns() // 1_000)


def _write_source(path: Path, entities: int, seed: int) -> None:
    random = np.random.default_rng(seed)
    keys = random.permutation(entities)
    fields = [(KEY, pa.int64()), ("event_time", pa.timestamp("us", "UTC"))]
    schema = pa.schema(fields + [(f"f{i}", pa.float64()) for i in range(FEATURES)])
    last_us = time.time_ns() // 1_000 - 1_000_000
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, entities, ROW_GROUP):
            part = keys[start : start + ROW_GROUP]
            times = last_us - random.integers(0, 86_400_000_000, len(part))
            values = [pa.array(random.standard_normal(len(part))) for _ in range(FEATURES)]
            writer.write_batch(pa.record_batch([pa.array(part), pa.array(times).cast(schema[1].type), *values], schema))


def materialize(folder: Path) -> tuple[int, float]:
    """Load the source into a store of its own; return the rows, and the seconds from opening it to closing it."""
    started = time.perf_counter()
    with featserve.open(folder, write=True) as project:
        rows = project.materialize(VIEW).rows_stored
    return rows, time.perf_counter() - started
