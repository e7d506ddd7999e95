"""What takes long lets others in: between its steps, and soon within them."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator

import pytest

from featserve.turns import SHORT_S, USUAL_S, give_way, short_turns

STEPS = 10_000


@pytest.fixture
def no_turns() -> Iterator[None]:
    """Nobody takes the interpreter from a thread that does not let go of it."""
    sys.setswitchinterval(1_000)
    yield
    sys.setswitchinterval(USUAL_S)


@pytest.mark.usefixtures("no_turns")
def test_who_waits_gets_the_interpreter_between_two_steps() -> None:
    started, going = threading.Event(), True
    turns = 0

    def wait() -> None:
        nonlocal turns
        started.set()
        while going and turns < 10 * STEPS:
            turns += 1
            give_way()

    other = threading.Thread(target=wait)
    other.start()
    started.wait()
    before = turns
    for _ in range(STEPS):
        give_way()
    after = turns
    going = False
    other.join()
    assert after > before


def test_turns_are_short_while_something_is_written_and_as_before_when_it_fails() -> None:
    found: list[float] = []

    @short_turns()
    def fail() -> None:
        found.append(sys.getswitchinterval())
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert found == [pytest.approx(SHORT_S)]
    assert sys.getswitchinterval() == pytest.approx(USUAL_S)
