"""featserve: an online feature server whose features mean the same when a model trains and when it is served.

Importing this loads nothing but the standard library: each name below is loaded when it is first used, so a client
needs only grpcio, protobuf and NumPy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from featserve.client import Client, connect
    from featserve.definitions import (
        Aggregate,
        Calendar,
        CsvSource,
        Entity,
        EventSource,
        FeatureService,
        FeatureView,
        Field,
        Hopping,
        OnDemandTransform,
        ParquetSource,
        RequestColumn,
        RequestTime,
        Rolling,
        Selection,
        Source,
        col,
        on_demand_transform,
    )
    from featserve.embedded import Embedded, open
    from featserve.errors import FeatserveError
    from featserve.matrix import FeatureMatrix, Status
    from featserve.types import Bool, Bytes, Float32, Float64, Int32, Int64, String, Timestamp, Vector

__version__ = "0.1.0"

_HOMES = {
    "client": ("Client", "connect"),
    "definitions": (
        "Aggregate", "Calendar", "CsvSource", "Entity", "EventSource", "FeatureService", "FeatureView", "Field",
        "Hopping", "OnDemandTransform", "ParquetSource", "RequestColumn", "RequestTime", "Rolling", "Selection",
        "Source", "col", "on_demand_transform",
    ),
    "embedded": ("Embedded", "open"),
    "errors": ("FeatserveError",),
    "matrix": ("FeatureMatrix", "Status"),
    "types": ("Bool", "Bytes", "Float32", "Float64", "Int32", "Int64", "String", "Timestamp", "Vector"),
}  # fmt: skip
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "Aggregate", "Bool", "Bytes", "Calendar", "Client", "CsvSource", "Embedded", "Entity", "EventSource",
    "FeatserveError", "FeatureMatrix", "FeatureService", "FeatureView", "Field", "Float32", "Float64", "Hopping",
    "Int32", "Int64", "OnDemandTransform", "ParquetSource", "RequestColumn", "RequestTime", "Rolling", "Selection",
    "Source", "Status", "String", "Timestamp", "Vector", "__version__", "col", "connect", "on_demand_transform", "open",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'featserve' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f"featserve.{_HOME[name]}"), name)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.startswith("featserve"):
            raise
        raise ModuleNotFoundError(
            f"featserve.{name} needs {error.name}: pip install 'featserve[server]'", name=error.name
        ) from None
