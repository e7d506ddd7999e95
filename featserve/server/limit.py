"""A limit of time that is the same for all tasks of an event loop: one timer, that of the first to end, does for all.

``asyncio.timeout`` makes a timer for each, which took a twelfth of a small request.
"""

from __future__ import annotations

import asyncio
from asyncio import CancelledError, Task
from collections import deque
from types import TracebackType
from typing import Any


class Limit:
    """The time of one task, from ``TimeLimit.begin`` on: ``with`` it, TimeoutError is raised where that is over."""

    __slots__ = ("ends_s", "over", "task")

    def __init__(self, task: Task[Any], ends_s: float) -> None:
        self.task: Task[Any] | None = task
        self.ends_s, self.over = ends_s, False

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        task, self.task = self.task, None
        # Whoever else has cancelled it, too, is to see that it was.
        if self.over and task is not None and not task.uncancel() and kind is CancelledError:
            raise TimeoutError from error


class TimeLimit:
    """Ends what takes longer than so many ``seconds``."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._running: deque[Limit] = deque()
        """In the order in which they end; those that have ended by themselves stay until they come first."""
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> Limit:
        """Limit the time of the current task."""
        loop, task, running = asyncio.get_running_loop(), asyncio.current_task(), self._running
        assert task is not None
        while running and running[0].task is None:
            running.popleft()
        limit = Limit(task, loop.time() + self._seconds)
        running.append(limit)
        if self._timer is None:
            self._timer = loop.call_at(limit.ends_s, self._expire, loop)
        return limit

    def _expire(self, loop: asyncio.AbstractEventLoop) -> None:
        running, now_s = self._running, loop.time()
        while running and (running[0].task is None or running[0].ends_s <= now_s):
            limit = running.popleft()
            if limit.task is not None:
                limit.over = True
                limit.task.cancel()
        self._timer = loop.call_at(running[0].ends_s, self._expire, loop) if running else None
