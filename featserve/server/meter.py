"""The counters of a server: what each request came to goes in, running counts and histograms are read from them.

Adding a request to them takes a microsecond or two, so that everything can be counted; an instrument of OpenTelemetry's
takes 2.6 µs an entry. Knows neither OpenTelemetry nor Prometheus: ``metrics`` shows the counters to those.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from threading import Lock
from typing import Any, Protocol

import numpy as np

from featserve.matrix import FeatureMatrix, Status
from featserve.plan import ReadPlan
from featserve.server.service import Record
from featserve.server.tally import Tally
from featserve.server.together import Share
from featserve.types import NEVER_US, Array
from featserve.wire import pack_rows

US, MS, SECOND = 1_000, 1_000_000, 1_000_000_000

LATENCY_NS = (
    *(n * US for n in (25, 50, 75, 100, 150, 200, 300, 400, 500, 750)),
    *(int(n * MS) for n in (1, 1.5, 2, 3, 5, 7.5, 10, 15, 20, 30, 50, 75, 100, 200, 300, 500, 1_000, 5_000)),
)
"""Upper bounds that tell a read of 100 µs from one of 150, and a stall of 300 ms from one of a second."""
DELAY_NS = tuple(int(n * MS) for n in (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500, 1_000))
AGE_US = tuple(
    int(seconds * 1_000_000)
    for seconds in (0.01, 0.1, 1, 10, 60, 300, 1_800, 3_600, 21_600, 86_400, 259_200, 604_800, 2_592_000, 31_536_000)
)
MOST_NOTED = 3 * 1_024
"""Numbers, three of each read for a service, that are noted before all are counted at once."""
MOST_BYTES_NOTED = 4_096
"""Bytes that tell what a read missed; where they are more, it is counted right away."""
SHARED = "GetFeatures"
"""The method whose requests share reads."""
AGES_EVERY_NS = 250 * MS
"""How often the ages of an answer are looked at, at most: reading event times costs more than all else here."""


class Buckets:
    """A histogram: counts of values by upper bound, the last one without, and the values' sum."""

    __slots__ = ("bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0

    def add(self, value: int) -> None:
        """Count a value; one that is a bound is in the bucket below it."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def add_all(self, values: Array, times: Array | int = 1) -> None:
        """Count an array of integers, each so many times."""
        found = np.bincount(np.repeat(np.searchsorted(self.bounds, values), times), minlength=len(self.counts))
        self.counts = [old + new for old, new in zip(self.counts, found.tolist(), strict=True)]
        self.sum += int((values * times).sum())


class Load(Protocol):
    """What a transport has on its hands: calls under way, and the calls so far that it refused as those were many.

    ``turn_ns``: since when, by ``perf_counter_ns``, its thread has been answering what it took last, 0 while that waits
    for more; None where the event loop answers.
    """

    @property
    def active(self) -> int: ...

    @property
    def turn_ns(self) -> int | None: ...

    @property
    def shed(self) -> int: ...

    def look(self) -> None: ...


Ended = tuple[Share, int]
"""A share, and when it was answered."""


@dataclass(slots=True)
class _Noted:
    """Reads for a service that are not counted yet.

    ``reads``: three numbers of each, one after the other: the nanoseconds that each of its requests took, how many
    requests those are, and their rows. ``missing``: what some have of ``Share.missing``. Lists, as to extend one needs
    no lock.
    """

    durations: Buckets
    tally: Tally
    reads: list[int] = field(default_factory=list)
    missing: list[tuple[bytes, bytes]] = field(default_factory=list)

    def count(self) -> None:
        """Count what was noted so far; what others note meanwhile stays."""
        missing = len(self.missing)  # first, as a read is noted before what it missed
        numbers = len(self.reads)
        took_ns, requests, rows = np.array(self.reads[:numbers], np.int64).reshape(-1, 3).T
        self.durations.add_all(took_ns, requests)
        self.tally.rows += int(rows.sum())
        if missing:
            status, validity = zip(*self.missing[:missing], strict=True)
            self.tally.add_missing(b"".join(status), b"".join(validity))
        del self.reads[:numbers], self.missing[:missing]


class Meter:
    """What a server has counted since it started.

    ``loads``: one for each transport. ``durations``: nanoseconds, by method, hash of the service or "", and status
    code. ``tallies``: rows and values, by the hash of their service. ``ages``: microseconds, by view. ``written``: rows
    written, and those of them stored, by view. ``pushed``: events by source and what became of them. ``loop_delay``:
    nanoseconds that the event loop came late to a task, or a thread that answers has been at its turn.
    ``ages_due_ns``: a request that begins no sooner is asked for event times, too, and then none for ``ages_every_ns``.
    Several threads may count.
    """

    def __init__(self, *, ages_every_ns: int = AGES_EVERY_NS, of_workers: bool = False) -> None:
        """``of_workers``: calls come from workers, which count them; what they wrote is counted here."""
        self.loads: list[Load] = []
        self._durations: dict[tuple[str, str, str], Buckets] = {}
        self._tallies: dict[str, Tally] = {}
        self.ages: dict[str, Buckets] = {}
        self.written: dict[str, list[int]] = {}
        self.pushed: dict[str, Counter[str]] = {}
        self.loop_delay = Buckets(DELAY_NS)
        self.ages_due_ns = 0
        self._lock = Lock()
        self.ages_every_ns, self._of_workers = ages_every_ns, of_workers
        self._counted: dict[tuple[str, str, str], tuple[Buckets, Tally | None]] = {}
        self._noted: dict[tuple[str, str], _Noted] = {}
        """Reads that were answered, by method and hash of the service."""
        self._latest: tuple[Any, str, Any] = (None, "", None)
        """The plan and method of what was noted last, and where: to look it up takes as long as to note."""

    @property
    def durations(self) -> Mapping[tuple[str, str, str], Buckets]:
        with self._lock:
            self._count_noted()
        return self._durations

    @property
    def tallies(self) -> Mapping[str, Tally]:
        with self._lock:
            self._count_noted()
        return self._tallies

    def count(self, load: Load) -> None:
        """Sum a transport's calls up with those of others."""
        if not self._of_workers:
            self.loads.append(load)

    def look(self, due_ns: int, now_ns: int) -> None:
        """Count how late the event loop came to a task, and for how long threads that answer have been at their turn.

        At any moment that is, in the mean, as long as one who arrives then has to wait for the end of it.
        """
        self.loop_delay.add(max(now_ns - due_ns, 0))
        for load in self.loads:
            load.look()
            if (turn_ns := load.turn_ns) is not None:
                self.loop_delay.add(max(now_ns - turn_ns, 0) if turn_ns else 0)

    def add(self, method: str, code: str, begun_ns: int, ended_ns: int, record: Record) -> None:
        """Count a request that began and ended at these readings of a stopwatch, with the name of its status code."""
        plan, matrix = record.plan, record.matrix
        if plan is not None and code == "OK" and not self._of_workers:
            rows, missing = record.whole, record.missing
            if rows is None and matrix is not None and matrix.valid is not None and not record.ages:
                rows = len(matrix)
                if missing is None:
                    missing = matrix.view_status.tobytes(), pack_rows(matrix.valid)
            if rows is not None:
                latest, latest_method, noted = self._latest
                if plan is not latest or method != latest_method or len(noted.reads) >= MOST_NOTED:
                    noted = self._noted_of(method, plan)
                noted.reads.extend((ended_ns - begun_ns, 1, rows))
                if missing is not None:
                    noted.missing.append(missing)
                    if len(missing[1]) > MOST_BYTES_NOTED:
                        self._count(noted)
                return
        with self._lock:
            if record.written is not None:
                written = self.written.setdefault(record.view, [0, 0])
                written[0] += record.written.rows
                written[1] += record.written.stored
            if record.pushed is not None:
                self.pushed.setdefault(record.source, Counter()).update(record.pushed.outcomes())
            if self._of_workers:
                return
            durations, tally = self._counters(method, code, plan)
            durations.add(ended_ns - begun_ns)
            if matrix is not None and tally is not None:
                tally.add(matrix)
                if record.ages:
                    self.ages_due_ns = begun_ns + self.ages_every_ns
                    self._add_ages(matrix, record.now_us)

    def refuse(self, method: str, code: str) -> None:
        """Count a request that was refused before anything of it was done, and so in no time."""
        with self._lock:
            if not self._of_workers:
                self._counters(method, code, None)[0].add(0)

    def note_together(self, ended: Sequence[Ended], begun_ns: Sequence[int]) -> None:
        """Count requests that one thread answered together. ``begun_ns``: when each of all began, in their order."""
        plan, method, noted = self._latest
        for share, ended_ns in ended:
            if share.asked.plan is not plan or method != SHARED or len(noted.reads) >= MOST_NOTED:
                plan, method = share.asked.plan, SHARED
                noted = self._noted_of(SHARED, plan)
            numbers = share.numbers
            first_ns = begun_ns[numbers[0]]
            if first_ns == begun_ns[numbers[-1]]:
                noted.reads.extend((ended_ns - first_ns, len(numbers), share.rows))
            else:
                noted.reads.extend((ended_ns - first_ns, 1, share.rows))
                for number in numbers[1:]:
                    noted.reads.extend((ended_ns - begun_ns[number], 1, 0))
            if share.missing is not None:
                noted.missing.append(share.missing)
                if len(share.missing[1]) > MOST_BYTES_NOTED:
                    self._count(noted)

    def add_together(self, share: Share, matrix: FeatureMatrix, ended_ns: int, begun_ns: Sequence[int]) -> None:
        """Count requests of a share that were answered with these rows and their event times."""
        with self._lock:
            durations, tally = self._counters(SHARED, "OK", share.asked.plan)
            durations.add_all(np.array([ended_ns - begun_ns[number] for number in share.numbers]))
            assert tally is not None
            tally.add(matrix)
            self.ages_due_ns = ended_ns + self.ages_every_ns
            self._add_ages(matrix, share.now_us)

    def _noted_of(self, method: str, plan: ReadPlan) -> _Noted:
        """Return where a read is noted, without the lock; what is there is counted first where it is much."""
        key = method, plan.schema.hash
        noted = self._noted.get(key)
        if noted is None:
            with self._lock:
                durations, tally = self._counters(method, "OK", plan)
                assert tally is not None
                return self._noted.setdefault(key, _Noted(durations, tally))
        if len(noted.reads) >= MOST_NOTED:
            self._count(noted)
        self._latest = plan, method, noted
        return noted

    def _count(self, noted: _Noted) -> None:
        with self._lock:
            noted.count()

    def _count_noted(self) -> None:
        """Count what was noted, under the lock."""
        for noted in self._noted.values():
            noted.count()

    def _counters(self, method: str, code: str, plan: ReadPlan | None) -> tuple[Buckets, Tally | None]:
        """Return what counts the requests of a method, code and service."""
        key = method, "" if plan is None else plan.schema.hash, code
        found = self._counted.get(key)
        if found is None:
            tally = None if plan is None else self._tallies.setdefault(plan.schema.hash, Tally(plan))
            durations = self._durations[key] = Buckets(LATENCY_NS)
            found = self._counted[key] = durations, tally
        return found

    def _add_ages(self, matrix: FeatureMatrix, now_us: int) -> None:
        assert matrix.event_times is not None
        for i, view in enumerate(matrix.schema.views):
            times = matrix.event_times[matrix.view_status[:, i] == Status.PRESENT, i]
            times = times[times > NEVER_US]  # of empty windows
            self.ages.setdefault(view.id, Buckets(AGE_US)).add_all(now_us - times)
