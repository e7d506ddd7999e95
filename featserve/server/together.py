"""GetFeatures requests that have come at the same time: those for one service share one read of the store.

Comes in: the bytes of requests. Goes out: shares, and the bytes of their answers. What asks for more than values as of
now, or is wrong in some way, is in no share: ``Service`` answers it alone, or says what is wrong.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from featserve._proto import serving_pb2 as pb
from featserve.batch import EntityKeys, Integers
from featserve.codec import event_time_us
from featserve.engine import Engine, fill, wanted
from featserve.errors import FeatserveError
from featserve.matrix import FeatureMatrix
from featserve.plan import Plans, ReadPlan
from featserve.stages import Stages
from featserve.wire import decode_keys, encode_parts, join_keys, parse, plain_integers

TOGETHER_BYTES = 512
"""The largest request that shares a read: a hundred rows gain nothing by it, and hold the others up."""
MOST_SEEN = 4_096
"""Requests that are known without parsing: some hundred bytes each."""
MOST_KNOWN_BYTES = 16 << 20
"""What the answers of a service that are known take at most, with the rows that they were made of."""
MOST_ONCE = 1 << 14
"""Answers that were asked for once, as far as they are remembered."""
MOST_MISSED, PAUSE = 64, 256
"""Reads for which nothing was known, by which what is known is left alone, and for how many reads."""
KNOWN_BYTES = 400
"""What such an answer takes beside these bytes: its objects, and its part of the dictionary."""

Ids = int | tuple[int, ...]
"""Where the stored rows that an answer is made of are in memory: one, or one of each view."""


class Known:
    """Answers of one service to requests for one row, by where the rows that they were made of are in memory, one of
    each view: the cache in front of the store gives the same objects until a write replaces them.

    A stored row says the same to whoever asks for it, until it expires: so an answer is looked up once the store was
    read, and is never older than that. Only rows that are all there, visible and without a null are known, and only
    from the second time on that they are asked for: to keep what nobody asks for again would cost more than it brings.
    They are held, so that nothing else can come to be where they are.
    """

    def __init__(self, ttls_us: Sequence[int | None]) -> None:
        """``ttls_us``: that of each view."""
        self._ttls_us = ttls_us
        self._answers: dict[Ids, bytes] = {}
        self._ends_us: dict[Ids, int] = {}
        """The last instant at which each is right, where it expires."""
        self._rows: list[bytes] = []
        self._once: set[int] = set()
        """The hashes of what was asked for."""
        self._since_us = 0
        self._held = 0
        self._missed = self._pause = 0

    def pauses(self) -> bool:
        """Say whether so much was not known lately that what comes next is not looked for."""
        if self._pause:
            self._pause -= 1
            return True
        if self._missed >= MOST_MISSED:
            self._missed, self._pause = MOST_MISSED // 2, PAUSE
        return False

    def get(self, ids: Sequence[Ids], now_us: int) -> list[bytes] | None:
        """Return the answer for the rows of each; None where one is not known, or not known to be right now."""
        answers: Any = list(map(self._answers.get, ids))
        if now_us < self._since_us or None in answers:
            self._missed += 1
            return None
        if self._ends_us and min(map(self._ends_us.__getitem__, ids)) < now_us:
            return None
        self._missed = max(self._missed - 3, 0)  # by one that is known more is won than three others lose
        return answers  # type: ignore[no-any-return]

    def add(self, ids: Sequence[Ids], rows: Sequence[tuple[bytes, ...]], answers: Sequence[bytes], now_us: int) -> None:
        """Take answers that are right now, if not for the first time; begin anew where it is too much, or the clock was
        put back.
        """
        if self._held > MOST_KNOWN_BYTES or now_us < self._since_us:
            self._answers, self._ends_us, self._rows, self._held = {}, {}, [], 0
        self._since_us = now_us
        if len(self._once) > MOST_ONCE:
            self._once.clear()
        for where, of, answer in zip(ids, rows, answers, strict=True):
            if (number := hash(where)) not in self._once:
                self._once.add(number)
            elif where not in self._answers:
                self._answers[where] = answer
                self._rows += of
                self._held += KNOWN_BYTES + len(answer) + sum(map(len, of))
                timed = zip(of, self._ttls_us, strict=True)
                ends_us = [event_time_us(row) + ttl_us for row, ttl_us in timed if ttl_us is not None]
                if ends_us:
                    self._ends_us[where] = min(ends_us)


class Asked:
    """What is asked of a service: its plan, and what is ``known`` of it."""

    def __init__(self, plan: ReadPlan) -> None:
        self.plan = plan
        # What windows say changes with time, and not only where a row does.
        lasts = all(view.records is None for view in plan.views)
        self.known = Known([view.ttl_us for view in plan.views]) if lasts else None


@dataclass(slots=True)
class Share:
    """Requests for one service: the number of each among all, its keys, all their rows, and the instant that they are
    answered at.

    ``missing``: the status of the rows of an answer and which of their values are valid, as ``encode_parts`` tells
    them; None where all are there and none is null.
    """

    asked: Asked
    numbers: list[int]
    keys: list[EntityKeys | Integers]
    rows: int = 0
    now_us: int = 0
    missing: tuple[bytes, bytes] | None = None

    def answer(
        self, engine: Engine, now_us: int, stages: Stages | None = None, event_times: bool = False
    ) -> tuple[FeatureMatrix | None, list[bytes]]:
        """Return the features of all of them, one after the other, and the answer of each; raises as ``read`` does.

        None in the place of features that are all there and hold no null, unless ``event_times`` are wanted, too.
        ``stages``: note in them what the time is spent on.
        """
        plan, known, requests = self.asked.plan, self.asked.known, len(self.numbers)
        self.now_us = now_us
        if stages is not None:
            stages.begin("keys")
        keys = join_keys(self.keys)
        self.rows = keys.count
        asked = wanted(plan, keys)
        if stages is not None:
            stages.begin("store read")
        found = engine.store.read_many(asked)
        if event_times or known is None or keys.count != requests or known.pauses():
            return self._filled(found, keys.count, now_us, stages, event_times)
        if stages is not None:
            stages.begin("known answers")
        places = list(map(id, found))
        ids: Sequence[Ids] = places if len(found) == requests else _each(places, requests)
        answers = known.get(ids, now_us)
        if answers is not None:
            return None, answers
        matrix, answers = self._filled(found, requests, now_us, stages)
        if matrix.valid is None:
            known.add(ids, _each(found, requests), answers, now_us)
        return matrix, answers

    def _filled(
        self, found: list[bytes | None], rows: int, now_us: int, stages: Stages | None, event_times: bool = False
    ) -> tuple[FeatureMatrix, list[bytes]]:
        """Return what ``answer`` does, from what the store has."""
        matrix = fill(self.asked.plan, found, rows, now_us, event_times=event_times, stages=stages)
        if stages is not None:
            stages.begin("encode")
        answers, status, validity = encode_parts(matrix, [of.count for of in self.keys])
        if validity:
            self.missing = status, validity
        return matrix, answers


class Sharing:
    """Puts requests for the services of ``plans`` in shares.

    Requests of one service mostly differ in the values of their keys alone. Where those are numbers of one column, they
    come last, and the bytes before them say all the rest. So what was parsed once is found by the length of the request
    and these bytes.
    """

    def __init__(self, plans: Plans, max_rows: int) -> None:
        self.plans, self._max_rows = plans, max_rows
        self._asked: dict[str, Asked] = {}
        """By the hash of the service."""
        self._seen: dict[int, tuple[int, dict[bytes, tuple[Asked, int]]]] = {}
        """By the length of requests: how many bytes come before the values, and what was asked for, by those."""
        self._left = MOST_SEEN

    def shares(self, requests: Sequence[bytes]) -> list[Share]:
        """Return the shares of requests."""
        shares: list[Share] = []
        joined: dict[Asked, Share] = {}
        for number, data in enumerate(requests):
            try:
                seen = self._look_up(data)
            except FeatserveError:
                continue
            if not isinstance(seen, tuple):  # dearer to ask for the message, which it seldom is
                continue
            asked, keys = seen
            share = joined.get(asked)
            if share is None or len(data) > TOGETHER_BYTES:
                shares.append(share := Share(asked, [], []))
                if len(data) <= TOGETHER_BYTES:
                    joined[asked] = share
            share.numbers.append(number)
            share.keys.append(keys)
        return shares

    def share(self, data: bytes) -> Share | pb.GetFeaturesRequest:
        """Return the share of one request, or what it says, where it is to be answered alone; raises as ``parse``."""
        seen = self._look_up(data)
        return Share(seen[0], [0], [seen[1]]) if isinstance(seen, tuple) else seen

    def _look_up(self, data: bytes) -> tuple[Asked, EntityKeys | Integers] | pb.GetFeaturesRequest:
        """Return what a request asks for, and its keys; all that it says, where it is to be answered alone."""
        if (known := self._seen.get(len(data))) is not None:
            size, heads = known
            if (seen := heads.get(data[:size])) is not None:
                return seen[0], Integers(data[size:], seen[1])
        request: pb.GetFeaturesRequest = parse(pb.GetFeaturesRequest, data)
        try:
            asked = self._asked_by(request, data)
        except FeatserveError:
            asked = None  # whoever answers it alone then says what is wrong
        return request if asked is None else asked

    def _asked_by(self, request: pb.GetFeaturesRequest, data: bytes) -> tuple[Asked, EntityKeys | Integers] | None:
        plan = self.plans.service(request.service)
        if plan.steps or _asks_more(request):
            return None
        if (asked := self._asked.get(plan.schema.hash)) is None:
            asked = self._asked[plan.schema.hash] = Asked(plan)
        if plan.integer_key is None:
            return asked, decode_keys(request.keys, plan.schema.keys, self._max_rows)
        keys = plain_integers(request.keys, *plan.integer_key, self._max_rows)
        if keys is None:
            return None
        if self._left:
            self._remember(data, request, asked, keys)
        return asked, keys

    def _remember(self, data: bytes, request: pb.GetFeaturesRequest, asked: Asked, keys: Integers) -> None:
        """Note what a request asks for, where the values of its key are the end of it."""
        request.DiscardUnknownFields()
        if request.SerializeToString() != data:
            return  # its fields are in another order, or there are others
        size = len(data) - len(keys.raw)
        known, heads = self._seen.setdefault(len(data), (size, {}))
        if known == size:
            heads[data[:size]] = asked, keys.count
            self._left -= 1


def _each(found: Sequence[Any], requests: int) -> list[tuple[Any, ...]]:
    """Return what was found for each request: that of the first view for all of them comes first."""
    return list(zip(*(found[at : at + requests] for at in range(0, len(found), requests)), strict=True))


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
