"""Which rows the last batches replaced: written with each batch, read by who follows the store and has rows cached.

A batch's keys stand under one of ``BATCHES`` keys in turn: the batch's number, 8 bytes, big-endian, then each key with
its length before it, 4 bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

PREFIX = b"\x00replaced"
BATCHES = 256
"""How many batches a follower may lag and still know which rows to let go of."""
MOST_KEYS = 4_096
"""How many keys a batch tells of."""
EVERY = b""
"""Stands for the keys of all rows; no row has it."""


def place(number: int) -> bytes:
    """Return the key under which the keys of a batch stand."""
    return PREFIX + (number % BATCHES).to_bytes(1, "big")


def packed(number: int, keys: Sequence[bytes] | None) -> bytes:
    """Return what stands there. ``keys``: of the rows that were replaced, None where that may be all."""
    if keys is None or len(keys) > MOST_KEYS:
        keys = [EVERY]
    return b"".join([number.to_bytes(8, "big"), *(part for key in keys for part in (len(key).to_bytes(4, "big"), key))])


def replaced(read: Callable[[list[bytes]], list[bytes | None]], first: int, last: int) -> list[bytes] | None:
    """Return the keys of the rows that batches ``first`` to ``last`` replaced; None where that may be all.

    ``read``: reads the store.
    """
    if not 0 <= last - first < BATCHES:
        return None
    numbers = range(first, last + 1)
    keys: list[bytes] = []
    for number, found in zip(numbers, read([place(number) for number in numbers]), strict=True):
        if found is None or found[:8] != number.to_bytes(8, "big"):
            return None  # another batch's are there by now
        at = 8
        while at < len(found):
            start = at + 4
            at = start + int.from_bytes(found[at:start], "big")
            keys.append(found[start:at])
    return None if EVERY in keys else keys
