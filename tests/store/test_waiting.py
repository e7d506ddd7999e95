"""Waiting until a store that follows another holds a certain write."""

from __future__ import annotations

import threading
from concurrent.futures import Future, wait
from pathlib import Path

import pytest

from featserve.errors import DeadlineExceeded, InvalidRequest, StoreError
from featserve.store.follow import Follower, sequence_of, token_of
from featserve.store.memory import MemoryStore
from tests.store.test_follow import opened, row


class Lagging(MemoryStore):
    """A store whose followers see nothing before ``allowed``, or fail."""

    def __init__(self) -> None:
        super().__init__()
        self.allowed, self.held, self.failing = threading.Event(), 0, False

    def catch_up(self) -> None:
        if self.failing:
            raise StoreError("the disk is gone")
        if self.allowed.is_set():
            self.held = super().sequence()

    def sequence(self) -> int:
        return self.held


def test_a_promise_is_kept_once_the_store_holds_the_write() -> None:
    """Whoever waits for a write is told when it is there, and others go on waiting."""
    store = Lagging()
    store.write_many([b"a"], [row(1)])
    follower = Follower(store, 0.001)
    first, second = follower.reached(1, 60), follower.reached(2, 60)
    assert not wait([first], 0.05).done
    store.allowed.set()
    first.result(60)
    assert not second.done()
    store.write_many([b"a"], [row(2)])
    second.result(60)
    follower.reached(2, 0).result(60)
    follower.close()


def test_a_promise_is_broken_at_its_deadline() -> None:
    """A write that does not come is given up after the seconds that were allowed, and the error says how far it is."""
    store = Lagging()
    follower = Follower(store, 3_600)
    late: Future[None] = follower.reached(7, 0.05)
    kept = follower.reached(7, 3_600)
    with pytest.raises(DeadlineExceeded, match=r"write 7 was asked for; the store here holds 0, .* s ago"):
        late.result(60)
    assert kept.cancel()
    follower.close()
    with pytest.raises(DeadlineExceeded, match="write 9"):
        follower.reached(9, 3_600).result(60)


def test_what_is_waited_for_fails_when_following_ends() -> None:
    """Closing leaves nobody waiting."""
    follower = Follower(Lagging(), 3_600)
    waiting = follower.reached(1, 3_600)
    follower.close()
    with pytest.raises(DeadlineExceeded, match="write 1"):
        waiting.result(60)


def test_a_store_that_cannot_be_followed(caplog: pytest.LogCaptureFixture) -> None:
    """A failing catch-up is logged, not at each turn, and shows as lag; following goes on once it can."""
    store = Lagging()
    store.allowed.set()
    follower = Follower(store, 0.001)
    follower.reached(0, 60).result(60)
    before_s = follower.lag_s()
    store.failing = True
    with pytest.raises(DeadlineExceeded):
        follower.reached(1, 0.1).result(60)
    assert follower.lag_s() > 0.09 > before_s
    assert [record.message for record in caplog.records] == [
        "cannot follow the store, still reading the rows of before: the disk is gone"
    ]
    store.failing = False
    store.write_many([b"a"], [row(1)])
    follower.reached(1, 60).result(60)
    follower.close()


def test_tokens(tmp_path: Path) -> None:
    """A token names a write of one store, whoever has it open, and of no other; nonsense is told."""
    store = opened(tmp_path / "store", "write")
    store.write_many([b"a"], [row(1)])
    token = token_of(store)
    follower = opened(tmp_path / "store", "follow")
    assert sequence_of(token, store) == sequence_of(token, follower) == store.sequence() == 1
    other = opened(tmp_path / "other", "write")
    with pytest.raises(InvalidRequest, match=r"is of another store than the one here"):
        sequence_of(token, other)
    for nonsense in ("", "x", token + "x", token.replace("-", ""), f"{store.identity()}-{'9' * 30}", "a-²"):
        with pytest.raises(InvalidRequest, match=r"is no token; take that of a write's answer"):
            sequence_of(nonsense, store)
    for each in (store, follower, other):
        each.close()
