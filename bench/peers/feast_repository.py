"""Makes Feast's repository, and writes its rows, in Feast's own environment.

Comes in: a folder with values.npy, and the port of Redis. Rows go in by ``write_to_online_store``, with the look for
older rows left out: it is the quickest way in that Feast has, a few thousand rows a second.
"""

from __future__ import annotations

import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pandas as pd
from feast import Entity, FeatureService, FeatureStore, FeatureView, Field, FileSource
from feast.types import Float32
from feast.value_type import ValueType

AT_ONCE = 5_000
CONFIG = """
project: bench
provider: local
registry: registry.db
entity_key_serialization_version: 3
offline_store: {{type: file}}
online_store: {{type: redis, connection_string: "127.0.0.1:{port}", skip_dedup: true}}
"""


def main(folder: Path, redis_port: int) -> None:
    """Apply a view of all columns and a service of that view, and write the rows."""
    values = np.load(folder / "values.npy")
    names = [f"f{i}" for i in range(values.shape[1])]
    frame = pd.DataFrame(values, columns=names)
    frame.insert(0, "account_id", np.arange(len(values)))
    frame.insert(1, "event_time", datetime.now(UTC) - timedelta(minutes=1))
    frame.head(1).to_parquet(folder / "rows.parquet")
    (folder / "feature_store.yaml").write_text(CONFIG.format(port=redis_port), encoding="utf-8")
    store = FeatureStore(repo_path=str(folder))
    account = Entity(name="account", join_keys=["account_id"], value_type=ValueType.INT64)
    source = FileSource(path=str(folder / "rows.parquet"), timestamp_field="event_time")
    schema = [Field(name=name, dtype=Float32) for name in names]
    view = FeatureView(name="account", entities=[account], schema=schema, source=source, ttl=timedelta(0))
    store.apply([account, view, FeatureService(name="score", features=[view])])
    for first in range(0, len(frame), AT_ONCE):
        store.write_to_online_store("account", frame.iloc[first : first + AT_ONCE])


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
