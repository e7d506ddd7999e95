"""Records of windowed views: folded in any batches, at any clock, they read as the naive oracle says."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import Any

import numpy as np
import pytest

from featserve.batch import EventBatch
from featserve.definitions import FeatureView
from featserve.folding import fold
from featserve.records import RecordCodec
from featserve.series import Pool, events_of
from featserve.types import NEVER_US, column, to_us
from tests.windows_model import Event, answers, distinct, make_history


def batch_of(view: FeatureView, events: Sequence[Event]) -> EventBatch:
    """Return events as a batch of the columns of their source."""
    assert view.events is not None
    columns = {f.name: column(f.type, [e.values[f.name] for e in events]) for f in view.events.fields}
    times = ([e.event_time_us for e in events], [e.known_at_us for e in events], [e.sequence for e in events])
    return EventBatch(columns, *(np.array(t, np.int64) for t in times))


class World:
    """The records of a view's entities as bytes, and every event that was folded into them."""

    def __init__(self, view: FeatureView) -> None:
        self.view, self.codec = view, RecordCodec(view)
        self.records: dict[tuple[Any, ...], bytes] = {}
        self.events: list[Event] = []

    def fold(self, events: Sequence[Event], now_us: int) -> None:
        """Fold events as they arrive at ``now_us``, in one batch."""
        self.events += events
        keyed = [(tuple(e.values[name] for name in self.view.entity.keys), e) for e in events]
        keyed = [(key, e) for key, e in keyed if None not in key]
        keys = list(dict.fromkeys(key for key, _ in keyed))
        if not keys:
            return
        pool = Pool()
        state = self.codec.decode([self.records.get(key, self.codec.empty) for key in keys], pool)
        owner = np.array([keys.index(key) for key, _ in keyed])
        come = events_of(self.codec.layout, batch_of(self.view, [e for _, e in keyed]), owner, pool)
        self.records |= zip(keys, self.codec.encode(fold(self.codec.layout, state, come, now_us), pool), strict=True)

    def check(self, asked: Sequence[tuple[Any, ...]], time_us: int) -> None:
        """Hold what is read at an instant against the oracle."""
        rows = self.codec.read([self.records.get(key) for key in asked], time_us)
        valid = rows.validity(len(self.view.features))
        event_times = rows.times()[0].tolist()
        told = [answers(self.view, self.events, key, time_us) for key in asked]
        for i, (f, aggregate) in enumerate(zip(self.view.features, self.view.aggregates, strict=True)):
            got = rows.column(f.type, self.codec.rows.place[f.name], valid[:, i]).to_list()
            for key, value, (_, expected) in zip(asked, got, told, strict=True):
                value = to_us(value) if isinstance(value, datetime) else value
                assert expected[f.name].agrees(value), (key, time_us, aggregate, value, expected[f.name])
        assert event_times == [NEVER_US if newest is None else newest for newest, _ in told]


@pytest.mark.parametrize("seed", range(20))
def test_records_read_as_the_oracle_says(seed: int) -> None:
    """Whatever the batches, their order and the clock, every aggregate over every kind of window is the oracle's."""
    rng = np.random.default_rng(seed)
    history = make_history(rng, asked=24)
    assert history.view.events is not None
    events = distinct(history.view.events, history.events)
    world = World(history.view)
    rng.shuffle(events)
    clocks = sorted(t for t, _ in history.asked)
    keys = list(dict.fromkeys(key for _, key in history.asked))
    cuts = np.sort(rng.integers(0, len(events) + 1, len(clocks)))
    for start, stop, now_us, later in zip([0, *cuts], cuts, clocks, [*clocks[1:], None], strict=False):
        world.fold(events[start:stop], now_us)
        world.check(keys, now_us)
        if later is not None:
            world.check(keys, int(rng.integers(now_us, later + 1)))
