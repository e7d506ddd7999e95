"""GetFeatures requests that have come at the same time: those for one service share one read of the store.

Comes in: the bytes of requests. Goes out: shares, and the bytes of their answers. What asks for more than values as of
now, or is wrong in some way, is in no share: ``Service.get_features`` answers it, or says what is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from featserve._proto import serving_pb2 as pb
from featserve.engine import Engine
from featserve.errors import FeatserveError
from featserve.matrix import FeatureMatrix
from featserve.plan import Plans, ReadPlan
from featserve.types import Column
from featserve.wire import encode_parts, join_keys, parse, plain_keys

TOGETHER_BYTES = 512
"""The largest request that shares a read: a hundred rows gain nothing by it, and hold the others up."""


@dataclass(slots=True)
class Share:
    """Requests for one service: the number of each among all, its rows and its keys."""

    plan: ReadPlan
    numbers: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    keys: list[dict[str, bytes | Column]] = field(default_factory=list)

    def read(self, engine: Engine, now_us: int) -> FeatureMatrix:
        """Return the features of all of them, one after the other; raises as ``Engine.read`` does."""
        rows = sum(self.rows)
        return engine.read(self.plan, join_keys(self.keys, self.plan.schema.keys, rows), now_us)

    def encode(self, matrix: FeatureMatrix) -> list[bytes]:
        """Return the answer of each, from what was read."""
        return encode_parts(matrix, self.rows)


def shared(plans: Plans, requests: Sequence[bytes], max_rows: int) -> list[Share]:
    """Return the shares of requests."""
    shares: list[Share] = []
    joined: dict[str, Share] = {}
    for number, data in enumerate(requests):
        try:
            request = parse(pb.GetFeaturesRequest, data)
            plan = plans.service(request.service)
            if plan.steps or _asks_more(request):
                continue
            found = plain_keys(request.keys, plan.schema.keys, max_rows)
        except FeatserveError:
            continue
        if found is None:
            continue
        share = joined.get(plan.schema.hash)
        if share is None or len(data) > TOGETHER_BYTES:
            share = Share(plan)
            shares.append(share)
            if len(data) <= TOGETHER_BYTES:
                joined[plan.schema.hash] = share
        share.numbers.append(number)
        share.rows.append(found[0])
        share.keys.append(found[1])
    return shares


def _asks_more(request: pb.GetFeaturesRequest) -> bool:
    """Say whether a request asks for more than values as of now."""
    return bool(
        request.include_schema
        or request.include_event_times
        or request.include_stages
        or request.at_least
        or request.request_columns
        or request.HasField("as_of_us")
    )
