"""Where windows start: the one place that turns a window and an instant into an event time, for both paths.

A window at T holds the events with ``start <= event_time <= T``, in microseconds, whatever its kind. Hops and local
periods, of which online records keep one partial each, are numbered: a window is a run of such numbers up to T's. To a
rolling window each microsecond is a period. Instants are int64 microseconds since the Unix epoch.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from functools import lru_cache
from zoneinfo import ZoneInfo

import numpy as np

from featserve.batch import Int64s
from featserve.definitions import Calendar, Hopping, Rolling, Window
from featserve.types import to_us

FIRST_US = -(2**63)
DAY_US = 86_400_000_000
EPOCH = date(1970, 1, 1).toordinal()
MONDAY = date(1969, 12, 29).toordinal()
LEAST_US, MOST_US = to_us(datetime(2, 1, 1, tzinfo=UTC)), to_us(datetime(9998, 12, 31, tzinfo=UTC))
"""The instants whose local periods are known; those beyond count to the first or the last of them."""


def starts(window: Window, time_us: Int64s) -> Int64s:
    """Return the first event time that a window at each instant holds, int64 of shape (n,)."""
    if isinstance(window, Rolling):
        return _back(time_us, window.duration_us - 1)
    if isinstance(window, Hopping):
        return _back(_floor(time_us, window.hop_us), window.duration_us)
    return each(lambda number: period_start_us(window, number - window.n + 1), periods(window, time_us))


def periods(window: Window, time_us: Int64s) -> Int64s:
    """Return the number of the hop or of the local period that each instant lies in, int64 of shape (n,)."""
    if isinstance(window, Rolling):
        return time_us
    if isinstance(window, Hopping):
        return time_us // window.hop_us
    time_us = np.clip(time_us, LEAST_US, MOST_US)
    days = time_us // DAY_US
    numbers = np.empty(len(time_us), np.int64)
    for day in np.unique(days).tolist():
        first, begins = _periods_near(window, day)
        here = days == day
        numbers[here] = first + np.searchsorted(begins, time_us[here], side="right")
    return numbers


def first_periods(window: Window, time_us: Int64s) -> Int64s:
    """Return the number of the first hop or local period that a window at each instant holds, int64 of shape (n,)."""
    if isinstance(window, Rolling):
        return starts(window, time_us)
    if isinstance(window, Hopping):
        return periods(window, time_us) - window.duration_us // window.hop_us
    return periods(window, time_us) - window.n + 1


def first_period(window: Window, time_us: int) -> tuple[int, int, int]:
    """Return what ``first_periods`` and ``starts`` say of one instant, in a fraction of their time.

    And the instant before which they say the same of all later ones.
    """
    if isinstance(window, Rolling):
        start_us = max(time_us - _lengths_us(window)[0] + 1, FIRST_US)
        return start_us, start_us, time_us + 1
    if isinstance(window, Hopping):
        duration_us, hop_us = _lengths_us(window)
        number = (time_us - duration_us) // hop_us
        return number, max(number * hop_us, FIRST_US), (number + 1) * hop_us + duration_us
    time_us = min(max(time_us, LEAST_US), MOST_US)
    first, begins = _periods_near(window, time_us // DAY_US)
    number = first + bisect_right(begins, time_us) - window.n + 1
    return number, period_start_us(window, number), period_start_us(window, number + window.n)


@lru_cache(maxsize=4_096)
def _lengths_us(window: Rolling | Hopping) -> tuple[int, int]:
    return window.duration_us, window.hop_us if isinstance(window, Hopping) else 1


@lru_cache(maxsize=4_096)
def _periods_near(window: Calendar, day: int) -> tuple[int, tuple[int, ...]]:
    """Return the number of a local period, and when each of the next begins that may on a day of UTC.

    A local date differs from that of UTC by a day at most; a month or a week may begin at any of the three.
    """
    first = _period_of_day(window, EPOCH + day - 1)
    return first, tuple(period_start_us(window, number) for number in range(first + 1, first + 4))


@lru_cache(maxsize=65_536)
def period_start_us(window: Calendar, number: int) -> int:
    """Return the instant at which local period ``number`` begins: its first midnight, or what the clock skips to."""
    try:
        if window.unit == "month":
            first = date(1970 + number // 12, number % 12 + 1, 1)
        else:
            first = date.fromordinal(EPOCH + number if window.unit == "day" else MONDAY + 7 * number)
        midnight = datetime(first.year, first.month, first.day, tzinfo=ZoneInfo(window.zone))
        return (midnight.astimezone(UTC) - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
    except (ValueError, OverflowError):
        return FIRST_US if number < 0 else 2**63 - 1


def _period_of_day(window: Calendar, ordinal: int) -> int:
    if window.unit == "day":
        return ordinal - EPOCH
    if window.unit == "week":
        return (ordinal - MONDAY) // 7
    day = date.fromordinal(ordinal)
    return (day.year - 1970) * 12 + day.month - 1


def each(function: Callable[[int], int], numbers: Int64s) -> Int64s:
    """Return the answers of ``function``, which is asked once for each distinct number; int64 of shape (n,)."""
    distinct, places = np.unique(numbers, return_inverse=True)
    answers = np.fromiter(map(function, distinct.tolist()), np.int64, len(distinct))
    return answers[places]


def _floor(time_us: Int64s, step_us: int) -> Int64s:
    return _back(time_us, time_us % step_us)


def _back(time_us: Int64s, us: int | Int64s) -> Int64s:
    """Return instants ``us`` earlier, the first of all where there is none."""
    return np.where(time_us < FIRST_US + us, FIRST_US, time_us - us)
