"""The ``OnlineStore`` protocol: what every store does with keys and rows that it does not understand.

A store keeps, for each key, the row with the greatest stamp (``codec.STAMP``, compared as bytes), whatever the order of
arrival. Batch read and batch write are the primitives; backends are named only in ``open_store``.

Beside the rows it keeps *notes*, a set of keys for who writes it. They are written together with rows, in one update,
and nobody who follows the store can read them, or pays for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from featserve.codec import STAMP

Access = Literal["write", "read", "follow"]


class Writes(NamedTuple):
    """What an update changes: the rows of keys, None where there is to be none, and notes to remove and to make.

    A note to make is not there yet. Where they are many they may be made in parts before the rest; where that is not
    written, none of them stays by the time that notes are read again.
    """

    rows: Mapping[bytes, bytes | None]
    forget: Sequence[bytes] = ()
    note: Sequence[bytes] = ()


Change = Callable[[list[bytes | None]], Writes]


class Load(Protocol):
    """A bulk load under way: nothing of it is visible before ``OnlineStore.load`` ends without an error.

    ``stored``: once it has ended, the number of keys whose row is now one that it added.
    """

    stored: int

    def add(self, keys: Sequence[bytes], rows: Sequence[bytes]) -> None:
        """Add rows, in any order, keys repeated or not."""


class OnlineStore(Protocol):
    """Keys to rows."""

    def read_many(self, keys: list[bytes]) -> list[bytes | None]:
        """Return the row of each key, None where there is none, in the order of ``keys``, which may repeat.

        Of a write, all rows are of before it or all of after it.
        """

    def write_many(self, keys: Sequence[bytes], rows: Sequence[bytes]) -> int:
        """Write rows atomically, each where no row with a greater stamp is; return how many were.

        Keys may repeat. On return the rows would survive the death of the process, or with the durability "fsync"
        that of the machine. Safe to call from several threads.
        """

    def update(self, keys: Sequence[bytes], change: Change, *, own: tuple[bytes, ...] = ()) -> None:
        """Read ``keys`` and write what ``change`` makes of their rows; atomically, notes included.

        One update runs at a time. ``change`` may read the store; nothing is written where it raises. As durable as
        ``write_many``. Stamps are not compared. ``own``: what keys start with that nobody reads who follows the store.
        """

    def updating(self) -> AbstractContextManager[None]:
        """Hold off the updates of other threads until the context ends."""

    def keys(self, first: bytes, end: bytes) -> Iterator[bytes]:
        """Yield the keys from ``first`` on that come before ``end``, in order."""

    def noted(self, keys: list[bytes]) -> list[bool]:
        """Return of each key whether it is among the notes; for who writes the store."""

    def notes(self, first: bytes, end: bytes) -> Iterator[bytes]:
        """Yield the notes from ``first`` on that come before ``end``, in order; for who writes the store."""

    def load(self) -> AbstractContextManager[Load]:
        """Start a bulk load; it becomes visible as a whole when the context ends, and not at all on an error.

        The ordering rule holds against rows that are written meanwhile.
        """

    def count(self, prefix: bytes) -> int:
        """Return the number of keys that start with ``prefix``; reads all of them."""

    def identity(self) -> str:
        """Return what tells this store from every other, eight hexadecimal digits."""

    def sequence(self) -> int:
        """Return the number of the last write that every read sees: each batch that changed something, and each load
        that did, is numbered one more than that before it.
        """

    def catch_up(self) -> None:
        """See what the process that writes the store has written, where this one follows it; else do nothing."""

    def size_bytes(self) -> int:
        """Return the bytes that the store takes on disk or in memory."""

    def cache_lookups(self) -> Mapping[str, tuple[int, int]]:
        """Return how many look-ups in each of its caches hit and missed; empty where it counts none."""

    def close(self) -> None:
        """Close it; what was written stays. Closing twice is allowed."""


def newest(keys: Sequence[bytes], rows: Sequence[bytes]) -> dict[bytes, bytes]:
    """Return the row with the greatest stamp for each key; among equal stamps the last."""
    best = dict(zip(keys, rows, strict=True))
    if len(best) == len(keys):
        return best
    best.clear()
    for key, row in zip(keys, rows, strict=True):
        if key not in best or best[key][STAMP] <= row[STAMP]:
            best[key] = row
    return best


def open_store(
    path: Path,
    access: Access,
    *,
    durability: str = "process",
    block_cache_mb: int = 384,
    row_cache_mb: int = 640,
    count_lookups: bool = False,
) -> OnlineStore:
    """Open the embedded store in folder ``path``; "write" makes one where there is none.

    "read" sees the rows that are there now; "follow" also what another process writes, at each ``catch_up``.
    ``count_lookups``: count what all its caches hit and miss, those of RocksDB, too, which makes reads some percent
    slower. Raises StoreLocked where another process has it open for writing, StoreError where it is missing or damaged.
    """
    from featserve.store.rocksdb import RocksStore

    return RocksStore(
        path,
        access,
        fsync=durability == "fsync",
        block_cache_mb=block_cache_mb,
        row_cache_mb=row_cache_mb,
        count_lookups=count_lookups,
    )


def is_held(path: Path) -> bool:
    """Say whether another process has the store in folder ``path`` open for writing."""
    from featserve.store.database import is_locked

    return is_locked(path)
