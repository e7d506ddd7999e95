"""How a bulk load sorts what it read: the same rows as written one by one, in the order of their keys."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import numpy as np
import pytest

from featserve import materialize
from featserve.engine import encode_rows
from featserve.plan import compile_view
from featserve.store.memory import MemoryStore
from tests.random_data import random_batch, random_entity, random_keys, random_view


class Added:
    """A load that keeps what it is given."""

    def __init__(self) -> None:
        self.stored = 0
        self.keys: list[bytes] = []
        self.rows: list[bytes] = []

    def add(self, keys: Sequence[bytes], rows: Sequence[bytes]) -> None:
        self.keys += keys
        self.rows += rows


def test_a_chunk_gives_the_newest_rows_in_the_order_of_their_keys(
    rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the types of keys and features, and however rows repeat, a store ends as if each had been written."""
    monkeypatch.setattr(materialize, "CHUNK_BYTES", 20_000)
    monkeypatch.setattr(materialize, "BLOCK_ROWS", 7)
    for _ in range(150):
        entity = random_entity(rng, "thing")
        plan = compile_view(random_view(rng, "things", entity))
        keys = random_keys(rng, entity, int(rng.integers(1, 40)))
        written, loaded = MemoryStore(), MemoryStore()
        chunk = materialize._Chunk(plan)
        for _ in range(3):
            added = Added()
            for taken in range(int(rng.integers(1, 4))):
                batch = random_batch(rng, plan.view, keys, 1_000_000, int(rng.integers(0, chunk.most_rows + 1)))
                if not chunk.takes(batch):
                    assert taken, "an empty chunk takes any batch of the size that it asks for"
                    break
                chunk.add(batch)
                written.write_many(*encode_rows(plan, batch))
            chunk.empty_into(added)
            assert all(a < b for a, b in pairwise(added.keys))
            loaded.write_many(added.keys, added.rows)
        stored = list(written._open())
        assert loaded.read_many(stored) == written.read_many(stored)
        assert len(loaded._open()) == len(stored)
