"""A store that follows what another opening writes: it sees all of it, in order, and says how far it has come."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from featserve.errors import StoreError
from featserve.store import Writes, open_store
from featserve.store.ahead import AHEAD
from featserve.store.announced import NAME
from featserve.store.follow import Follower
from featserve.store.rocksdb import RocksStore
from tests.serving import until

KEYS = [b"key %04d" % i for i in range(400)]


def row(number: int, payload: bytes = b"") -> bytes:
    """Return a row whose stamp is ``number``."""
    return b"\xf5\x01\0\0view" + number.to_bytes(8, "big") * 3 + payload


def numbers(found: list[bytes | None]) -> list[int]:
    """Return the numbers of rows, 0 where there is none."""
    return [0 if row is None else int.from_bytes(row[8:16], "big") for row in found]


def opened(path: Path, access: str, **options: int) -> RocksStore:
    store = open_store(path, access, **{"block_cache_mb": 8, "row_cache_mb": 1} | options)  # type: ignore[arg-type]
    assert isinstance(store, RocksStore)
    return store


class History:
    """A store that is written, what it was told, and what each of its writes left under each key."""

    def __init__(self, path: Path, rng: np.random.Generator) -> None:
        self.path, self.rng = path, rng
        self.store = opened(path, "write")
        self.number = 0
        self.live = dict.fromkeys(KEYS, 0)

    def step(self) -> None:
        """Do one thing that a writer may do."""
        kinds = {
            "write": 0.4,
            "push": 0.3,
            "load": 0.1,
            "flush": 0.05,
            "flush_notes": 0.05,
            "compact": 0.05,
            "reopen": 0.05,
        }
        getattr(self, self.rng.choice([*kinds], p=[*kinds.values()]))()

    def rows(self, most: int) -> dict[bytes, bytes]:
        self.number += 1
        first = int(self.rng.integers(len(KEYS)))
        picked = KEYS[first : first + int(self.rng.integers(1, most))]
        self.live.update(dict.fromkeys(picked, self.number))
        return {key: row(self.number, self.rng.bytes(int(self.rng.integers(300)))) for key in picked}

    def write(self) -> None:
        rows = self.rows(20)
        self.store.write_many(list(rows), list(rows.values()))

    def push(self) -> None:
        rows = self.rows(20)
        count = int(self.rng.choice([50, 2 * AHEAD]))
        old, new = ([b"%d %d" % (number, i) for i in range(count)] for number in (self.number - 20, self.number))
        self.store.update(list(rows), lambda found: Writes(rows, old, new))

    def load(self) -> None:
        with self.store.load() as load:
            for _ in range(int(self.rng.integers(1, 3))):
                rows = self.rows(200)
                load.add(list(rows), list(rows.values()))

    def flush(self) -> None:
        """Do as RocksDB does when its log has grown: merge it, and go on with the write that found it so."""
        self.store._opened().flush()
        self.write()

    def flush_notes(self) -> None:
        """Do the same for the notes alone: the rows of the log before stay in it."""
        self.store._opened_notes().flush()
        self.write()

    def compact(self) -> None:
        self.store._opened().flush()
        self.store._opened().compact_range(None, None)
        self.write()

    def reopen(self) -> None:
        self.store.close()
        self.store = opened(self.path, "write")


@pytest.mark.parametrize("turns", [150, pytest.param(1_500, marks=pytest.mark.slow)])
@pytest.mark.parametrize("row_cache_mb", [0, 1])
def test_a_follower_sees_what_was_written(
    tmp_path: Path, rng: np.random.Generator, row_cache_mb: int, turns: int
) -> None:
    """Whatever the writer does, a follower that has caught up, often or seldom, reads the same rows."""
    history = History(tmp_path / "store", rng)
    history.write()
    followers = [opened(history.path, "follow", row_cache_mb=row_cache_mb) for _ in range(3)]
    for turn in range(turns):
        history.step()
        for follower, every in zip(followers, (1, 3, 40), strict=True):
            if turn % every == 0:
                follower.catch_up()
                assert follower.sequence() == history.store.sequence(), f"turn {turn}"
                assert numbers(follower.read_many(KEYS)) == list(history.live.values()), f"turn {turn}"
    for follower in followers:
        follower.close()
    history.store.close()


@pytest.mark.parametrize("seconds", [2, pytest.param(40, marks=pytest.mark.slow)])
def test_a_follower_holds_what_it_says(tmp_path: Path, seconds: float) -> None:
    """While logs are merged and files compacted all the time, no follower lacks a write whose number it tells.

    One that comes upon a merge may need another catch-up to hold what was acknowledged, and no more than a few.
    """
    store = opened(tmp_path / "store", "write")
    store._opened().set_options({"write_buffer_size": "65536"})
    done, groups = threading.Event(), 7
    first = store.sequence() + 1

    def write() -> None:
        while not done.is_set():
            number = store.sequence() + 1
            keys = KEYS[number % groups :: groups]
            store.write_many(keys, [row(number, bytes(300))] * len(keys))

    writer = threading.Thread(target=write)
    writer.start()
    lacking: list[str] = []
    follower, caught_up, short = opened(store.path, "follow"), 0, 0
    ends = time.monotonic() + seconds
    while time.monotonic() < ends and not lacking:
        acknowledged = store.sequence()
        follower.catch_up()
        caught_up += 1
        held = follower.sequence()
        short = short + 1 if held < acknowledged else 0
        if short > 5:
            lacking.append(f"{held} after {acknowledged} was acknowledged, {short} times on end")
        for i, found in enumerate(numbers(follower.read_many(KEYS))):
            expected = held - (held - i) % groups
            if found < expected >= first:
                lacking.append(f"key {i} has write {found}, not {expected}, though {held} is held")
    done.set()
    writer.join()
    assert not lacking
    assert caught_up > 10
    follower.close()
    store.close()


@pytest.mark.parametrize("page", [None, b"", bytes(8), b"\xff" * 8])
def test_a_number_that_is_wrong_hides_nothing(tmp_path: Path, page: bytes | None) -> None:
    """Where the writer's page is not there, or says another number, a follower sees what is written all the same."""
    writer = opened(tmp_path / "store", "write")
    writer.write_many([b"a"], [row(1)])
    announced = tmp_path / "store" / NAME
    assert int.from_bytes(announced.read_bytes(), "big") == writer.sequence()
    announced.unlink()
    if page is not None:
        announced.write_bytes(page)
    follower = opened(tmp_path / "store", "follow")
    writer.write_many([b"a"], [row(2)])
    follower.catch_up()
    assert follower.read_many([b"a"]) == [row(2)]
    assert follower.sequence() == writer.sequence()
    follower.close()
    writer.close()


def test_a_follower_that_holds_all_leaves_rocksdb_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It asks the database for more once for each write that it lacks, and not each time that it looks."""
    writer, follower = opened(tmp_path / "store", "write"), opened(tmp_path / "store", "follow")
    asked: list[None] = []

    def changing() -> Iterator[list[object]]:
        asked.append(None)
        yield []

    monkeypatch.setattr(follower, "_changing", contextmanager(changing))
    for number in range(1, 4):
        writer.write_many([b"a"], [row(number)])
        for _ in range(5):
            follower.catch_up()
        assert len(asked) == number
    monkeypatch.undo()
    follower.close()
    writer.close()


def test_what_a_follower_may_not(tmp_path: Path) -> None:
    """A follower neither writes nor makes a store, and leaves no file behind."""
    with pytest.raises(StoreError, match=r"there is no store at .*materialize"):
        opened(tmp_path / "store", "follow")
    assert list(tmp_path.iterdir()) == []
    writer = opened(tmp_path / "store", "write")
    follower = opened(tmp_path / "store", "follow")
    assert follower.identity() == writer.identity()
    with pytest.raises(StoreError, match="open for reading"):
        follower.write_many([b"a"], [row(1)])
    with pytest.raises(StoreError, match="open for reading"), follower.load():
        pass
    assert follower._opened().property_int_value("rocksdb.block-cache-capacity") == 8 << 20
    assert follower._messages is not None
    messages = Path(follower._messages.name)
    assert messages.is_dir()
    follower.close()
    assert not messages.exists()
    with pytest.raises(StoreError, match="closed"):
        follower.catch_up()
    writer.close()


def test_a_wait_that_is_cancelled_is_forgotten(tmp_path: Path) -> None:
    """Of waits without an end, those that nobody waits for any more leave nothing behind."""
    writer, store = opened(tmp_path / "store", "write"), opened(tmp_path / "store", "follow")
    follower = Follower(store, 0.002)
    waits = [follower.reached(writer.sequence() + 1_000_000, float("inf")) for _ in range(100)]
    assert all(wait.cancel() for wait in waits)
    until("they are forgotten", lambda: not follower._waiting, 10)
    follower.close()
    store.close()
    writer.close()
