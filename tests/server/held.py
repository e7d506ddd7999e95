"""The reads of a store in this process: counted, and held up while a test sends what is to wait behind them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from featserve.store.rocksdb import RocksStore
from tests.serving import PATIENCE_S


class Reads:
    """``keys``: how many each read has asked for so far."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.keys: list[int] = []
        self._begun, self._may_go_on = threading.Event(), threading.Event()
        self._may_go_on.set()
        read_many = RocksStore.read_many

        def held(store: RocksStore, keys: list[bytes]) -> list[bytes | None]:
            self.keys.append(len(keys))
            self._begun.set()
            assert self._may_go_on.wait(PATIENCE_S)
            return read_many(store, keys)

        monkeypatch.setattr(RocksStore, "read_many", held)

    @contextmanager
    def held(self) -> Iterator[threading.Event]:
        """Let no read end; give what tells that one has begun."""
        self._begun.clear()
        self._may_go_on.clear()
        try:
            yield self._begun
        finally:
            self._may_go_on.set()
