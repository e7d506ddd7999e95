"""What the pieces are measured on: a view of 50 float64 features, in a store of 20,000 entities that caches hold."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from featserve.batch import EntityKeys, EventBatch
from featserve.catalog import Snapshot
from featserve.engine import Engine
from featserve.plan import Plans
from featserve.store import OnlineStore
from featserve.types import Column, Float64, Int64

ENTITIES = 20_000
NOW_US = 1_700_000_000_000_000


@dataclass(frozen=True)
class Served:
    """Definitions, their plans, and a store with a row for each entity."""

    snapshot: Snapshot
    plans: Plans
    store: OnlineStore

    @property
    def engine(self) -> Engine:
        return Engine(self.store, self.plans)

    def keys(self, count: int) -> EntityKeys:
        """Return random entities."""
        drawn = np.random.default_rng(5).integers(0, ENTITIES, count)
        return EntityKeys({"account_id": Column(Int64, drawn)}, count)


def batch(rows: int) -> EventBatch:
    """Return one row for each of the first ``rows`` entities."""
    random = np.random.default_rng(7)
    columns = {f"f{i}": Column(Float64, random.standard_normal(rows)) for i in range(50)}
    columns["account_id"] = Column(Int64, np.arange(rows))
    times = np.full(rows, NOW_US - 1)
    return EventBatch(columns, times, times, np.arange(rows))
