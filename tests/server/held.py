"""The reads, or the writes, of a store in this process: counted, and held up while a test sends what is to wait."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from featserve.store.rocksdb import RocksStore
from tests.serving import PATIENCE_S


class Held:
    """``keys``: how many each read, or write, was of so far. ``method``: of the store, of which it holds every call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, method: str = "read_many") -> None:
        self.keys: list[int] = []
        self._begun, self._may_go_on = threading.Event(), threading.Event()
        self._may_go_on.set()
        meant = getattr(RocksStore, method)

        def held(store: RocksStore, keys: list[bytes], *rows: Any) -> Any:
            self.keys.append(len(keys))
            self._begun.set()
            assert self._may_go_on.wait(PATIENCE_S)
            return meant(store, keys, *rows)

        monkeypatch.setattr(RocksStore, method, held)

    @contextmanager
    def held(self) -> Iterator[threading.Event]:
        """Let none end; give what tells that one has begun."""
        self._begun.clear()
        self._may_go_on.clear()
        try:
            yield self._begun
        finally:
            self._may_go_on.set()
