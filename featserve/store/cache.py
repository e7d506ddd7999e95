"""Rows that were read lately, in dictionaries in front of a store: from RocksDB's own caches one costs ten times more.

Comes in: what reads found and what writes changed. Goes out: rows, each the one that the store holds. Knows of no
store. Where all that a read wants is here it takes no lock.

Rows are of two generations. What is read goes to the young one, from the old one, too; what is too much goes from the
old one, one for one, as freeing a million rows at once would stop everybody; when that is empty, the young one is the
old one. Dictionaries of bytes hold nothing that Python's garbage collector would have to look at.

A read that misses goes to the store while others may write. So it says what ``state`` was before, and its rows are
taken only if no write has begun or ended since: nothing old gets in after a write has replaced it. Rows that are read
while something is written go together where they are not among what it changes.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping, Sequence, Set

ROW_BYTES = 150
"""What a row takes in memory beside the bytes of its key and its own: two objects and its part of the dictionary."""
FREED = 2
"""Rows that are of no generation any more and are freed for each that comes: more than one, so that they end."""


class RowCache:
    """The rows read last, in up to ``most_bytes``."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._young: dict[bytes, bytes] = {}
        self._old: dict[bytes, bytes] = {}
        self._bytes = 0
        self._left: list[dict[bytes, bytes]] = []
        self._lock = threading.Lock()
        self.state = 0
        """Another number after each beginning and end of a write; odd during one."""
        self._last: tuple[int, Set[bytes] | None] = -1, None
        """The number of the last write, and which keys it changes; None where that may be any."""
        self.hits = self.misses = 0

    def get(self, keys: list[bytes]) -> list[bytes | None]:
        """Return the row of each key, None where it is not here."""
        rows = list(map(self._young.get, keys))
        if not all(rows):
            if self._old:
                rows = [self._bring_back(key) if row is None else row for key, row in zip(keys, rows, strict=True)]
            missed = rows.count(None)
            self.misses += missed
            self.hits -= missed
        self.hits += len(keys)
        return rows

    def peek(self, keys: Sequence[bytes]) -> list[bytes | None]:
        """Return the row of each key as ``get`` does, for the writer: it counts for nothing and stays where it is."""
        rows: list[bytes | None] = list(map(self._young.get, keys))
        if None in rows:
            old = self._old
            rows = [old.get(key) if row is None else row for key, row in zip(keys, rows, strict=True)]
        return rows

    def add(self, keys: Sequence[bytes], rows: Iterable[bytes | None], state: int) -> None:
        """Take the rows that the store had of keys, where no write has begun or ended since ``state``."""
        with self._lock:
            if state == self.state and not state & 1:
                for key, row in zip(keys, rows, strict=True):
                    if row:  # an empty one would look like none
                        self._take(key)  # another thread may have read it, too
                        self._put(key, row)

    def apart(self, keys: Iterable[bytes], state: int) -> bool:
        """Say whether one write was under way since ``state``, no more, and is known to change none of these keys."""
        now = self.state
        number, changed = self._last
        return number == state // 2 == (now - 1) // 2 and changed is not None and changed.isdisjoint(keys)

    def begin(self, keys: Set[bytes] | None) -> None:
        """Take nothing more until the write that begins has ended. One write is under way at a time.

        ``keys``: which it changes; None where that may be any.
        """
        with self._lock:
            self._last = self.state // 2, keys
            self.state += 1

    def end(self, changed: Mapping[bytes, bytes | None] | None) -> None:
        """End a write that made these rows of keys, None where there is none now or it is not known.

        ``changed`` is None where the write may have changed any row.
        """
        with self._lock:
            self._last = self.state // 2, None if changed is None else changed.keys()
            if changed is None:
                self._left += [self._old, self._young]
                self._old, self._young, self._bytes = {}, {}, 0
            else:
                for rows in (self._young, self._old):
                    self._replace(rows, changed)
                self._fit()
            self.state += 1

    def _bring_back(self, key: bytes) -> bytes | None:
        """Return the row of a key, which is young from now on."""
        with self._lock:
            row = self._take(key)
            if row is not None:
                self._put(key, row)
            return row

    def _take(self, key: bytes) -> bytes | None:
        """Remove the row of a key and return it, under the lock."""
        row = self._young.pop(key, None) or self._old.pop(key, None)
        if row is not None:
            self._bytes -= _bytes(key, row)
        return row

    def _replace(self, rows: dict[bytes, bytes], changed: Mapping[bytes, bytes | None]) -> None:
        """Put the changed rows of a generation where those of their keys are, or remove those, under the lock."""
        more = 0
        for key in rows.keys() & changed.keys():
            before, row = rows[key], changed[key]
            if row:
                rows[key] = row
                more += len(row) - len(before)
            else:
                del rows[key]
                more -= _bytes(key, before)
        self._bytes += more

    def _put(self, key: bytes, row: bytes) -> None:
        """Put a row that is not here in the young generation, under the lock."""
        self._young[key] = row
        self._bytes += _bytes(key, row)
        self._fit()

    def _fit(self) -> None:
        """Let go of what is too much, and free some of what is of no generation any more, under the lock."""
        while self._bytes > self._most_bytes:
            if not self._old:
                self._old, self._young = self._young, {}
            self._bytes -= _bytes(*self._old.popitem())
        for rows in self._left[-1:]:
            for _ in range(min(FREED, len(rows))):
                rows.popitem()
            if not rows:
                self._left.pop()


def _bytes(key: bytes, row: bytes) -> int:
    return ROW_BYTES + len(key) + len(row)
