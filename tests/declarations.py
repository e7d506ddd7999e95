"""Definitions for tests that are about what is done with them."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from featserve.catalog import Definitions
from featserve.definitions import Entity, FeatureService, FeatureView, Field, ParquetSource
from featserve.types import Float32, Float64, String

AIRPORT = Entity("airport", {"origin": String}, description="Where a flight starts")
NOW_US = 1_700_000_000_000_000


def view(name: str = "weather", version: int = 1, **changes: Any) -> FeatureView:
    parts: dict[str, Any] = {
        "entity": AIRPORT,
        "features": [Field("temp", Float32), Field("wind", Float64, description="knots", min=0.0)],
        "ttl": timedelta(hours=3),
        "source": ParquetSource("weather/*.parquet", event_time="time", delay=timedelta(minutes=5)),
        "owner": "ops",
    }
    return FeatureView(name, version=version, **(parts | changes))


def declare(*items: FeatureView | FeatureService) -> Definitions:
    """Return definitions that hold ``items`` and all that they are made of."""
    services = [item for item in items if isinstance(item, FeatureService)]
    views = [v for v in items if isinstance(v, FeatureView)] + [v for s in services for v in s.views]
    return Definitions(
        entities={v.entity.name: v.entity for v in views},
        views={v.id: v for v in views},
        transforms={t.id: t for s in services for t in s.transforms},
        services={s.id: s for s in services},
    )
