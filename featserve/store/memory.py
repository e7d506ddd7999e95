"""The ``OnlineStore`` in a dictionary: the model that the real stores are tested against, and a store for tests."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from featserve.codec import STAMP
from featserve.errors import StoreError
from featserve.store import Change, Load, newest


class MemoryStore:
    """Rows by key; gone when the process ends."""

    def __init__(self) -> None:
        self._rows: dict[bytes, bytes] | None = {}
        self._notes: set[bytes] = set()
        self._lock, self._updates = threading.Lock(), threading.RLock()
        self._identity, self._sequence = secrets.token_hex(4), 0

    def read_many(self, keys: list[bytes]) -> list[bytes | None]:
        with self._lock:
            return list(map(self._open().get, keys))

    def write_many(self, keys: Sequence[bytes], rows: Sequence[bytes]) -> int:
        with self._lock:
            stored = self._open()
            won = {
                key: row
                for key, row in newest(keys, rows).items()
                if key not in stored or stored[key][STAMP] <= row[STAMP]
            }
            stored.update(won)
            self._sequence += bool(won)
            return len(won)

    def update(self, keys: Sequence[bytes], change: Change, *, own: tuple[bytes, ...] = ()) -> None:
        with self._updates:
            writes = change(self.read_many(list(keys)))
            with self._lock:
                stored = self._open()
                for key, row in writes.rows.items():
                    if row is None:
                        stored.pop(key, None)
                    else:
                        stored[key] = row
                self._notes.difference_update(writes.forget)
                self._notes.update(writes.note)
                self._sequence += any(writes)

    def updating(self) -> AbstractContextManager[Any]:
        return self._updates

    def keys(self, first: bytes, end: bytes) -> Iterator[bytes]:
        return iter(sorted(key for key in list(self._open()) if first <= key < end))

    def noted(self, keys: list[bytes]) -> list[bool]:
        return [key in self._notes for key in keys]

    def notes(self, first: bytes, end: bytes) -> Iterator[bytes]:
        return iter(sorted(key for key in list(self._notes) if first <= key < end))

    @contextmanager
    def load(self) -> Iterator[Load]:
        self._open()
        pending = _Pending()
        yield pending
        pending.stored = self.write_many(pending.keys, pending.rows)

    def count(self, prefix: bytes) -> int:
        return sum(key.startswith(prefix) for key in self._open())

    def identity(self) -> str:
        return self._identity

    def sequence(self) -> int:
        return self._sequence

    def catch_up(self) -> None:
        pass

    def size_bytes(self) -> int:
        return sum(len(key) + len(row) for key, row in self._open().items())

    def cache_lookups(self) -> dict[str, tuple[int, int]]:
        return {}

    def close(self) -> None:
        self._rows = None

    def _open(self) -> dict[bytes, bytes]:
        if self._rows is None:
            raise StoreError("the store is closed")
        return self._rows


class _Pending:
    """The rows of a load until it ends."""

    def __init__(self) -> None:
        self.keys: list[bytes] = []
        self.rows: list[bytes] = []
        self.stored = 0

    def add(self, keys: Sequence[bytes], rows: Sequence[bytes]) -> None:
        self.keys += keys
        self.rows += rows
