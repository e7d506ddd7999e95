"""What a team writes down once: entities, sources, feature views, on-demand transforms and feature services.

Comes in: Python objects in a definitions file. Goes out: frozen values, each with a canonical JSON form (``to_dict``),
the part of that form which can change a value (``meaning``) and its hash. Everything inconsistent fails here, at
construction, with a message that says what and where. Knows no file, no registry, no store.
"""

from featserve.definitions.expression import Expression, col, evaluate, sql, type_of
from featserve.definitions.field import Field
from featserve.definitions.rules import Json, content_hash, micros
from featserve.definitions.service import FeatureService
from featserve.definitions.source import CsvSource, ParquetSource, Rows, Source
from featserve.definitions.transform import (
    OnDemandTransform,
    Outputs,
    RequestColumn,
    RequestTime,
    on_demand_transform,
)
from featserve.definitions.view import Entity, FeatureView, Selection
from featserve.definitions.window import Aggregate, Calendar, EventSource, Hopping, Rolling, Window

__all__ = [
    "Aggregate",
    "Calendar",
    "CsvSource",
    "Entity",
    "EventSource",
    "Expression",
    "FeatureService",
    "FeatureView",
    "Field",
    "Hopping",
    "Json",
    "OnDemandTransform",
    "Outputs",
    "ParquetSource",
    "RequestColumn",
    "RequestTime",
    "Rolling",
    "Rows",
    "Selection",
    "Source",
    "Window",
    "col",
    "content_hash",
    "evaluate",
    "micros",
    "on_demand_transform",
    "sql",
    "type_of",
]
