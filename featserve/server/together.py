"""GetFeatures requests that have come at the same time: those for one service share one read of the store.

Comes in: the bytes of requests. Goes out: shares, and the bytes of their answers. What asks for more than values as of
now, or is wrong in some way, is in no share: ``Service.get_features`` answers it, or says what is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from featserve._proto import serving_pb2 as pb
from featserve.batch import EntityKeys, Integers
from featserve.engine import Engine
from featserve.errors import FeatserveError
from featserve.matrix import FeatureMatrix
from featserve.plan import Plans, ReadPlan
from featserve.wire import decode_keys, encode_parts, integer_key, join_keys, parse, plain_integers

TOGETHER_BYTES = 512
"""The largest request that shares a read: a hundred rows gain nothing by it, and hold the others up."""
MOST_SEEN = 4_096
"""Requests that are known without parsing: some hundred bytes each."""


@dataclass(slots=True)
class Share:
    """Requests for one service: the number of each among all, and its keys."""

    plan: ReadPlan
    numbers: list[int]
    keys: list[EntityKeys | Integers]

    def read(self, engine: Engine, now_us: int) -> FeatureMatrix:
        """Return the features of all of them, one after the other; raises as ``Engine.read`` does."""
        return engine.read(self.plan, join_keys(self.keys), now_us)

    def encode(self, matrix: FeatureMatrix) -> list[bytes]:
        """Return the answer of each, from what was read."""
        return encode_parts(matrix, [keys.count for keys in self.keys])


class Sharing:
    """Puts requests for the services of ``plans`` in shares.

    Requests of one service mostly differ in the values of their keys alone. Where those are numbers of one column, they
    come last, and the bytes before them say all the rest. So what was parsed once is found by the length of the request
    and these bytes.
    """

    def __init__(self, plans: Plans, max_rows: int) -> None:
        self.plans, self._max_rows = plans, max_rows
        self._seen: dict[int, tuple[int, dict[bytes, tuple[ReadPlan, int]]]] = {}
        """By the length of requests: how many bytes come before the values, and what was asked for, by those."""
        self._left = MOST_SEEN

    def shares(self, requests: Sequence[bytes]) -> list[Share]:
        """Return the shares of requests."""
        shares: list[Share] = []
        joined: dict[str, Share] = {}
        for number, data in enumerate(requests):
            try:
                asked = self._asked(data)
            except FeatserveError:
                continue
            if asked is None:
                continue
            plan, keys = asked
            small = len(data) <= TOGETHER_BYTES
            share = joined.get(plan.schema.hash) if small else None
            if share is not None:
                share.numbers.append(number)
                share.keys.append(keys)
                continue
            shares.append(share := Share(plan, [number], [keys]))
            if small:
                joined[plan.schema.hash] = share
        return shares

    def _asked(self, data: bytes) -> tuple[ReadPlan, EntityKeys | Integers] | None:
        """Return what a request asks for: a plan, and keys. None where it is to be answered alone."""
        if (known := self._seen.get(len(data))) is not None:
            size, heads = known
            if (seen := heads.get(data[:size])) is not None:
                plan, rows = seen
                return plan, Integers(data[size:], rows)
        request = parse(pb.GetFeaturesRequest, data)
        plan = self.plans.service(request.service)
        if plan.steps or _asks_more(request):
            return None
        expected = plan.schema.keys
        key = integer_key(expected)
        if key is None:
            return plan, decode_keys(request.keys, expected, self._max_rows)
        keys = plain_integers(request.keys, next(iter(expected)), key, self._max_rows)
        if keys is None:
            return None
        if self._left:
            self._remember(data, request, plan, keys)
        return plan, keys

    def _remember(self, data: bytes, request: pb.GetFeaturesRequest, plan: ReadPlan, keys: Integers) -> None:
        """Note what a request asks for, where the values of its key are the end of it."""
        request.DiscardUnknownFields()
        if request.SerializeToString() != data:
            return  # its fields are in another order, or there are others
        size = len(data) - len(keys.raw)
        known, heads = self._seen.setdefault(len(data), (size, {}))
        if known == size:
            heads[data[:size]] = plan, keys.count
            self._left -= 1


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
