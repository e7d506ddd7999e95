"""The time that calls without a deadline get: over for each by itself, however many there are, and for no other."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from featserve.server.limit import TimeLimit

LIMIT_S = 0.2


def test_each_ends_when_its_own_time_is_over(rng: np.random.Generator) -> None:
    """Of tasks that begin one after the other, those that wait for ever end after their time, in their order."""
    ended: list[int] = []

    async def one(limit: TimeLimit, number: int, waits: bool) -> float:
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        try:
            with limit.begin():
                await (asyncio.Event().wait() if waits else asyncio.sleep(0))
        except TimeoutError:
            ended.append(number)
            return loop.time() - began_s
        return 0.0

    async def all_of_them() -> list[float]:
        limit, tasks = TimeLimit(LIMIT_S), []
        for number, waits in enumerate(waiting):
            tasks.append(asyncio.create_task(one(limit, number, waits)))
            await asyncio.sleep(0.005)
        return await asyncio.gather(*tasks)

    waiting = (rng.random(60) < 0.5).tolist()
    took_s = asyncio.run(all_of_them())
    assert ended == np.flatnonzero(waiting).tolist()
    for waits, seconds in zip(waiting, took_s, strict=True):
        assert seconds >= 0.99 * LIMIT_S if waits else seconds == 0


def test_who_is_cancelled_by_others_is_not_out_of_time() -> None:
    """Cancelling stays what it is while there is time, and is too late after that."""

    async def waits(limit: TimeLimit) -> None:
        with limit.begin():
            await asyncio.Event().wait()

    async def ended(after_s: float) -> type[BaseException]:
        task = asyncio.create_task(waits(TimeLimit(LIMIT_S)))
        await asyncio.sleep(0)
        asyncio.get_running_loop().call_later(after_s, task.cancel)
        (error,) = await asyncio.gather(task, return_exceptions=True)
        assert error is not None
        return type(error)

    assert asyncio.run(ended(0.0)) is asyncio.CancelledError
    assert asyncio.run(ended(2 * LIMIT_S)) is TimeoutError


def test_a_task_goes_on_after_its_time() -> None:
    """What comes after the limit is not cancelled once more, and may have a limit of its own."""

    async def twice() -> list[str]:
        limit, found = TimeLimit(LIMIT_S), list[str]()
        for _ in range(2):
            with pytest.raises(TimeoutError), limit.begin():
                await asyncio.Event().wait()
            await asyncio.sleep(0)
            found.append("went on")
        task = asyncio.current_task()
        assert task is not None
        assert not task.cancelling()
        return found

    assert asyncio.run(twice()) == ["went on"] * 2
