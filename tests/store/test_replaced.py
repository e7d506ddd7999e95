"""What a batch says of the rows it replaced, and what a follower makes of it."""

from __future__ import annotations

import numpy as np

from featserve.store.replaced import BATCHES, MOST_KEYS, packed, place, replaced


def test_a_follower_learns_every_key_or_that_it_cannot(rng: np.random.Generator) -> None:
    """Of any run of batches it gets the keys of all, or None: where it lags too far, or one of them tells no keys."""
    stored: dict[bytes, bytes] = {}
    told: dict[int, list[bytes] | None] = {}
    told_all = 0
    for number in range(1, 3 * BATCHES):
        keys = [rng.bytes(int(rng.integers(1, 40))) for _ in range(rng.integers(0, 5))]
        told[number] = None if rng.random() < 0.01 else keys
        stored[place(number)] = packed(number, told[number])
        first = number - int(rng.integers(0, BATCHES + 20)) if rng.random() < 0.2 else number
        parts = [told[i] for i in range(max(first, 1), number + 1)]
        known = first > 0 and number - first < BATCHES and None not in parts
        expected = [name for part in parts for name in part or []] if known else None
        got = replaced(lambda names: [stored.get(name) for name in names], first, number)
        assert (got and sorted(got)) == (expected and sorted(expected))
        told_all += known
    assert told_all > BATCHES


def test_a_follower_that_is_ahead_or_far_behind_asks_for_nothing() -> None:
    """Batches that are not there, or whose places are taken by later ones, cost no read."""

    def read(names: list[bytes]) -> list[bytes | None]:
        raise AssertionError(names)

    assert replaced(read, 5, 4) is None
    assert replaced(read, 1, BATCHES + 1) is None


def test_a_batch_of_too_many_keys_tells_none() -> None:
    """The keys of a huge batch are not written a second time."""
    keys = [number.to_bytes(4, "big") for number in range(MOST_KEYS + 1)]
    stored = {place(1): packed(1, keys), place(2): packed(2, keys[1:])}
    read = [stored.get(place(number)) for number in (1, 2)]
    assert replaced(lambda names: read[:1], 1, 1) is None
    assert replaced(lambda names: read[1:], 2, 2) == keys[1:]
    assert len(stored[place(1)]) < 20
