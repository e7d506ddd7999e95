"""The stages of one request: which began when, noted while it runs and read when it has ended.

Knows no request and no clock but a stopwatch. Who runs a stage says only that it begins; it lasts until the next one
begins, or the request ends. A request that nobody watches has no ``Stages``: None is passed in their place.
"""

from __future__ import annotations

from collections.abc import Iterable
from time import perf_counter_ns
from typing import NamedTuple


class Stage(NamedTuple):
    """One stage of a request: nanoseconds from the start of the first stage to its own, and its length."""

    name: str
    start_ns: int
    duration_ns: int


class Stages:
    """The stages of one request, in the order that they began in. ``begun``: names and stopwatch readings, in ns."""

    __slots__ = ("begun", "ended_ns")

    def __init__(self, *begun: tuple[str, int]) -> None:
        self.begun = list(begun)
        self.ended_ns = 0

    def begin(self, name: str) -> None:
        """Begin a stage, and so end the one before it."""
        self.begun.append((name, perf_counter_ns()))

    def end(self) -> None:
        """End the last stage."""
        self.ended_ns = perf_counter_ns()

    def take(self, stages: Iterable[Stage]) -> None:
        """Take the stages of a request that ran elsewhere."""
        for stage in stages:
            self.begun.append((stage.name, stage.start_ns))
            self.ended_ns = stage.start_ns + stage.duration_ns

    def timed(self) -> list[Stage]:
        """Return the stages with their times, once the last one has ended."""
        begun = self.begun.copy()  # a write whose caller is gone may still go on
        stops = [at for _, at in begun[1:]] + [self.ended_ns]
        return [Stage(name, at - begun[0][1], stop - at) for (name, at), stop in zip(begun, stops, strict=True)]
