"""Notes that are made in parts before the batch that they belong to, so that nobody waits for all of them at once.

The first part names all of them in a note, which the batch removes. Where the batch is never written, they are removed
when the store is next written or opened, or its notes are read.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import rocksdict

from featserve.store.database import NOTES, translated
from featserve.store.replaced import grouped, ungrouped
from featserve.turns import give_way

AHEAD_KEY = b"\x00ahead"
"""The note that names those that were made ahead of a batch, until it is written."""
AHEAD = 512
"""How many are made at once: who waits for the interpreter waits for as long as that takes."""


class Ahead:
    """What was made ahead. ``keys``: of a batch that is not written yet, or could not be."""

    def __init__(self, path: Path) -> None:
        """``path``: of the store."""
        self._path = path
        self.keys: Sequence[bytes] = ()

    def opened(self, db: rocksdict.Rdict, notes: rocksdict.Rdict) -> None:
        """Remove what a process left that died before it wrote the batch."""
        if (left := notes.get(AHEAD_KEY)) is not None:
            self.keys = ungrouped(left)
            self._take_back(db)

    def settle(self, db: rocksdict.Rdict) -> None:
        """Remove what a batch left that could not be written. Raises StoreError."""
        if self.keys:
            with translated(f"cannot write to the store at {self._path}"):
                self._take_back(db)

    def begin(self, db: rocksdict.Rdict, keys: Sequence[bytes]) -> Sequence[bytes]:
        """Make notes ahead of a batch where they are many; return those that belong in it. Raises StoreError."""
        self.settle(db)
        if len(keys) <= AHEAD:
            return keys
        with translated(f"cannot write to the store at {self._path}"):
            self._make(db, keys)
        return ()

    def _make(self, db: rocksdict.Rdict, keys: Sequence[bytes]) -> None:
        self.keys = keys
        notes = db.get_column_family_handle(NOTES)
        for start in range(0, len(keys), AHEAD):
            batch = rocksdict.WriteBatch(raw_mode=True)
            if start == 0:
                batch.put(AHEAD_KEY, grouped(keys), notes)
            for key in keys[start : start + AHEAD]:
                batch.put(key, b"", notes)
            give_way()
            db.write(batch)
        give_way()

    def _take_back(self, db: rocksdict.Rdict) -> None:
        notes = db.get_column_family_handle(NOTES)
        batch = rocksdict.WriteBatch(raw_mode=True)
        for key in (*self.keys, AHEAD_KEY):
            batch.delete(key, notes)
        db.write(batch)
        self.keys = ()
