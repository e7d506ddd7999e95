"""Which rows the last batches replaced: written with each batch, read by who follows the store and has rows cached.

A batch's keys stand under one of ``BATCHES`` keys in turn: the batch's number, 8 bytes, big-endian, then groups of keys
of one length: that length and how many they are, 4 bytes each, and the keys.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import groupby
from struct import Struct

PREFIX = b"\x00replaced"
BATCHES = 256
"""How many batches a follower may lag and still know which rows to let go of."""
MOST_KEYS = 4_096
"""How many keys a batch tells of."""
GROUP = Struct(">II")
EVERY = GROUP.pack(0, 0)
"""Stands for the keys of all rows; none is of length 0."""


def place(number: int) -> bytes:
    """Return the key under which the keys of a batch stand."""
    return PREFIX + (number % BATCHES).to_bytes(1, "big")


def packed(number: int, keys: Sequence[bytes] | None) -> bytes:
    """Return what stands there. ``keys``: of the rows that were replaced, None where that may be all."""
    head = number.to_bytes(8, "big")
    if keys is None or len(keys) > MOST_KEYS:
        return head + EVERY
    return head + grouped(keys)


def grouped(keys: Sequence[bytes]) -> bytes:
    """Return keys in groups of one length."""
    groups = ((length, list(group)) for length, group in groupby(sorted(keys, key=len), len))
    return b"".join([GROUP.pack(length, len(group)) + b"".join(group) for length, group in groups])


def ungrouped(data: bytes) -> list[bytes]:
    """Return the keys that ``grouped`` made this of."""
    keys: list[bytes] = []
    end = 0
    while end < len(data):
        length, count = GROUP.unpack_from(data, end)
        start = end + GROUP.size
        end = start + length * count
        keys += [data[at : at + length] for at in range(start, end, length)]
    return keys


def replaced(read: Callable[[list[bytes]], list[bytes | None]], first: int, last: int) -> list[bytes] | None:
    """Return the keys of the rows that batches ``first`` to ``last`` replaced; None where that may be all.

    ``read``: reads the store.
    """
    if not 0 <= last - first < BATCHES:
        return None
    numbers = range(first, last + 1)
    keys: list[bytes] = []
    for number, found in zip(numbers, read([place(number) for number in numbers]), strict=True):
        if found is None or found[:8] != number.to_bytes(8, "big") or found[8:] == EVERY:
            return None  # another batch's are there by now, or too many were replaced
        keys += ungrouped(found[8:])
    return keys
