"""Notes that are made ahead of their batch: none stays where the batch is not written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from featserve.errors import StoreError
from featserve.store import Writes
from featserve.store.ahead import AHEAD
from tests.store.test_rocksdb import opened, row


class Failing:
    """A database of which one write fails, the ``number``-th from now on."""

    def __init__(self, database: Any, number: int) -> None:
        self._database, self._left = database, number

    def __getattr__(self, name: str) -> Any:
        return getattr(self._database, name)

    def write(self, batch: Any) -> None:
        self._left -= 1
        if self._left == 0:
            raise OSError("IO error: While appending")
        self._database.write(batch)


@pytest.mark.parametrize("again", ["written", "opened", "asked"])
@pytest.mark.parametrize("fails", [1, 2, 4, 5])
def test_no_note_stays_ahead_of_what_is_not_written(tmp_path: Path, fails: int, again: str) -> None:
    """Wherever an update fails, in one of four parts of notes or behind them, it leaves none, and no other is gone.

    Whether the store is next written, opened, or asked for its notes.
    """
    path = tmp_path / "store"
    store, ahead = opened(path), [b"\x01" + n.to_bytes(2 + n % 3, "big") for n in range(4 * AHEAD)]
    store.update([], lambda found: Writes({}, note=[b"\x01other"]))
    database = store._db
    store._db = Failing(database, fails)
    with pytest.raises(StoreError, match="appending"):
        store.update([], lambda found: Writes({b"a": row(1)}, note=ahead))
    store._db = database
    assert store._notes is not None
    made = store._notes.get(ahead)
    assert len(made) - made.count(None) == min(fails - 1, 4) * AHEAD
    left = [b"\x01other"]
    if again == "written":
        store.update([], lambda found: Writes({}, note=[*ahead[:2], b"\x03"]))
        left += [*ahead[:2], b"\x03"]
    elif again == "opened":
        store.close()
        store = opened(path)
    assert list(store.notes(b"", b"\xff")) == sorted(left)
    assert store.read_many([b"a"]) == [None]
    store.close()
