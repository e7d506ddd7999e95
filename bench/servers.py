"""The servers that are compared, each in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from bench.report import ROOT


class Server:
    """A server process on a free port, from ``with`` on; its first line of output ends with its address."""

    def __init__(self, name: str, *arguments: str) -> None:
        self.name = name
        self._arguments = arguments

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", *self._arguments],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"`python -m {' '.join(self._arguments)}` ended before it served")
        self.address = line.split()[-1]
        self._watched = psutil.Process(self._process.pid)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._process.terminate()
        self._process.wait(30)
        assert self._process.stdout is not None
        self._process.stdout.close()

    def processes(self) -> list[psutil.Process]:
        """Return its process and those that it has started."""
        return [self._watched, *self._watched.children(recursive=True)]

    def cpu_s(self) -> float:
        """Return the seconds of processor time that it has taken, with the processes that it has started."""
        # Linux's clock of a process, as clock_getcpuclockid names it: to the nanosecond, psutil's is to the hundredth.
        return sum(time.clock_gettime(~process.pid << 3 | 2) for process in self.processes())

    def memory_mb(self) -> float:
        """Return the memory that it holds (its resident set), in MiB."""
        return float(self._watched.memory_info().rss / 2**20)


def shared_out() -> tuple[set[int], set[int]]:
    """Return a core for servers and the others for what loads them, so that neither takes the other's time.

    On one core both are the same.
    """
    first, *others = sorted(os.sched_getaffinity(0))
    return {first}, set(others) or {first}


@contextmanager
def on(cores: set[int]) -> Iterator[None]:
    """Have this thread, and the processes that it starts meanwhile, run on these cores alone."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def ours(folder: Path, transport: str | None = None, *, workers: int = 1) -> Server:
    """Return the server that a user starts, with so many workers; ``transport``: instead of the project's."""
    chosen = [] if transport is None else ["--transport", transport]
    arguments = ["serve", "--project", str(folder), "--port", "0", "--workers", str(workers), *chosen]
    return Server("featserve" if transport is None else f"featserve, {transport}", "featserve", *arguments)


def bare(folder: Path, transport: str = "grpcio") -> Server:
    """Return the bare server on a transport."""
    return Server(f"bare {transport}", "bench.bare", transport, str(folder))
