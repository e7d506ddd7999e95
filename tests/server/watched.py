"""A server that is watched: traced, counted or both, with a service that has transforms."""

from __future__ import annotations

import urllib.request
from pathlib import Path
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from featserve._proto import serving_pb2 as pb
from tests.server.messages import packed, texts
from tests.serving import DEFINITIONS, TRANSPORTS, Project, Server, until

WITH_TRANSFORMS = f"""{DEFINITIONS}
from featserve import RequestColumn, on_demand_transform


@on_demand_transform(
    inputs={{"score": activity["score"], "by": RequestColumn("by", Float32)}}, outputs=[Field("x", Float32)]
)
def scaled(score, by):
    if (by == 666).any():
        raise ValueError("by is 666")
    return score * by


scored = FeatureService("scored", [activity["score", "plan"], weather["temp"], scaled], version=3)
"""

Sample = tuple[str, frozenset[tuple[str, str]]]


def watched(folder: Path, transport: str, server: dict[str, Any] | None = None, **telemetry: Any) -> Server:
    """Return a server, not started yet, with ``telemetry`` as its settings say."""
    project = Project.make(folder, WITH_TRANSFORMS)
    project.configure(
        store={"block_cache_mb": 8, "row_cache_mb": 1},
        server={"port": 0} | TRANSPORTS[transport] | (server or {}),
        telemetry=telemetry,
    )
    return Server(project)


def scored(*users: int, by: float = 2.0) -> pb.GetFeaturesRequest:
    """Ask for what is stored and computed about users; ``by`` 666 makes the transform fail."""
    places = [texts("country", *["de"] * len(users)), texts("zip", *["10115"] * len(users))]
    keys = [packed("user_id", "q", *users), *places]
    return pb.GetFeaturesRequest(service="scored", keys=keys, request_columns=[packed("by", "f", *[by] * len(users))])


def page(server: Server) -> str:
    """Return the page of metrics."""
    said = until("metrics have an address", lambda: [e for e in server.events() if e["message"] == "metrics"])
    return fetch(said[-1]["address"])


def fetch(address: str) -> str:
    """Return the text at an address."""
    with urllib.request.urlopen(address, timeout=60) as answer:
        text: str = answer.read().decode()
    return text


def scrape(server: Server) -> dict[Sample, float]:
    """Return the samples of the page of metrics, by name and labels, as Prometheus' own client reads them."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(page(server))
        for sample in family.samples
    }


def value(samples: dict[Sample, float], name: str, **labels: str) -> float:
    """Return the sum of the samples of a name that have these labels; dots of the labels' names are underscores."""
    wanted = set(labels.items())
    return sum(v for (n, have), v in samples.items() if n == name and wanted <= have)
