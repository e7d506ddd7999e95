"""Where windows start: hops, rolling durations, and local days, weeks and months of many zones, against zoneinfo."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta
from zoneinfo import ZoneInfo

import numpy as np
import pytest

from featserve.definitions import Calendar, Hopping, Rolling, Window
from featserve.types import to_us
from featserve.windows import FIRST_US, first_period, first_periods, period_start_us, periods, starts
from tests.windows_model import CHANGES, HOUR_US, start_us

HOUR, DAY = timedelta(hours=1), timedelta(days=1)
ZONES = (
    "UTC",
    "America/New_York",
    "Europe/London",
    "America/Sao_Paulo",  # until 2019 it skipped midnight in spring, and repeated the hour before it in autumn
    "Asia/Beirut",  # skips midnight
    "Africa/Cairo",  # skips midnight
    "Pacific/Apia",  # had no 30 December 2011
    "Pacific/Kiritimati",  # UTC+14
    "Pacific/Niue",  # UTC-11
    "Asia/Kathmandu",  # UTC+5:45
    "Australia/Lord_Howe",  # changes by half an hour
    "America/Havana",  # skips midnight, and has it twice
    "Asia/Gaza",  # skips midnight in some years
    "America/St_Johns",  # once changed a minute after midnight
    "Antarctica/Troll",  # changes by two hours
)
MIDNIGHTS = {
    ("America/Sao_Paulo", date(2018, 11, 4)): "2018-11-04T03:00Z",  # the day begins at 01:00
    ("America/Sao_Paulo", date(2018, 2, 18)): "2018-02-18T03:00Z",  # after 23:00 to 24:00 twice
    ("Asia/Beirut", date(2024, 3, 31)): "2024-03-30T22:00Z",
    ("Africa/Cairo", date(2024, 4, 26)): "2024-04-25T22:00Z",
    ("America/Havana", date(2024, 11, 3)): "2024-11-03T04:00Z",  # the first of two midnights
    ("Pacific/Apia", date(2011, 12, 31)): "2011-12-30T10:00Z",
    ("America/New_York", date(2024, 3, 10)): "2024-03-10T05:00Z",
    ("America/St_Johns", date(2009, 11, 1)): "2009-11-01T02:30Z",  # a minute later it is 23:01 once more
}


def instants(rng: np.random.Generator, zone: str) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Return instants of 1950 to 2037, and a microsecond around each midnight of days near the zone's clock changes."""
    low, high = to_us(datetime(1950, 1, 1, tzinfo=UTC)), to_us(datetime(2037, 12, 31, tzinfo=UTC))
    found = rng.integers(low, high, 40).tolist()
    changes = [*CHANGES, *(to_us(datetime.fromisoformat(text)) for (z, _), text in MIDNIGHTS.items() if z == zone)]
    for change in changes:
        for days in (-1, 0, 1):
            midnight = start_us(Calendar(1, "day", zone), change + 24 * days * HOUR_US)
            found += [midnight - 1, midnight, midnight + 1, midnight + HOUR_US]
        found += [change - 1, change, change + 1]
    return np.array(found, np.int64)


@pytest.mark.parametrize("zone", ZONES)
def test_calendar(rng: np.random.Generator, zone: str) -> None:
    """A local day, week or month begins where the oracle, which asks for each instant's date, finds its first."""
    times = instants(rng, zone)
    for window in (Calendar(1, "day", zone), Calendar(7, "day", zone), Calendar(2, "week", zone),
                   Calendar(1, "month", zone), Calendar(14, "month", zone)):  # fmt: skip
        expected = [start_us(window, t) for t in times.tolist()]
        assert starts(window, times).tolist() == expected, window


@pytest.mark.parametrize(("zone", "day"), MIDNIGHTS)
def test_midnights_that_are_skipped_or_repeated(zone: str, day: date) -> None:
    """A day whose midnight the clock skips begins at what it skips to, and one with two midnights at the first."""
    begins = to_us(datetime.fromisoformat(MIDNIGHTS[zone, day]))
    window = Calendar(1, "day", zone)
    assert starts(window, np.array([begins - 1, begins, begins + HOUR_US])).tolist()[1:] == [begins, begins]
    assert starts(window, np.array([begins - 1]))[0] < begins
    assert datetime.fromtimestamp(begins / 1e6, ZoneInfo(zone)).date() == day


def test_a_day_that_was_not() -> None:
    """Samoa had no 30 December 2011: to its 31st, the day before is an empty day that begins with it."""
    window = Calendar(2, "day", "Pacific/Apia")
    at = to_us(datetime(2011, 12, 30, 12, tzinfo=UTC))
    assert starts(window, np.array([at])).tolist() == [to_us(datetime(2011, 12, 30, 10, tzinfo=UTC))]


def test_hopping_and_rolling(rng: np.random.Generator) -> None:
    """They start where their definitions say, before 1970 as after it."""
    times = np.concatenate([rng.integers(-(2**60), 2**60, 500), np.arange(-20, 20)]).astype(np.int64)
    windows: list[Window] = [Rolling(timedelta(microseconds=1)), Rolling(HOUR), Hopping(7 * DAY, HOUR)]
    windows += [Hopping(timedelta(microseconds=6), timedelta(microseconds=3))]
    for window in windows:
        assert starts(window, times).tolist() == [start_us(window, t) for t in times.tolist()]


@pytest.mark.parametrize("window", [Hopping(7 * DAY, HOUR), *(Calendar(3, "day", zone) for zone in ZONES)], ids=str)
def test_periods_tile_time(rng: np.random.Generator, window: Hopping | Calendar) -> None:
    """Starts are the starts of periods: an instant lies in its period, and a window begins with its first one."""
    times = np.sort(instants(rng, getattr(window, "zone", "UTC")))
    numbers = periods(window, times)
    assert (np.diff(numbers) >= 0).all()
    if isinstance(window, Hopping):
        assert (numbers * window.hop_us <= times).all()
        assert (first_periods(window, times) * window.hop_us == starts(window, times)).all()
        return
    for time_us, number, first, start in zip(
        times.tolist(), numbers.tolist(), first_periods(window, times).tolist(), starts(window, times).tolist(),
        strict=True,
    ):  # fmt: skip
        assert period_start_us(window, number) <= time_us < period_start_us(window, number + 1)
        assert period_start_us(window, first) == start


PERIODS = [window for zone in ZONES for window in (Calendar(1, "month", zone), Calendar(2, "day", zone))]


@pytest.mark.parametrize("window", [Rolling(DAY), Hopping(7 * DAY, HOUR), *PERIODS], ids=str)
def test_one_instant_is_like_many(rng: np.random.Generator, window: Window) -> None:
    """What is said of one instant is what is said of it among many, and holds until when it says, and no longer."""
    for time_us in instants(rng, getattr(window, "zone", "UTC")).tolist():
        number, start, until_us = first_period(window, time_us)
        around = np.array([time_us, until_us - 1, until_us])
        assert starts(window, around).tolist()[:2] == [start, start]
        same, still, later = first_periods(window, around).tolist()
        assert same == still == number < later


@pytest.mark.parametrize(
    "window", [Rolling(7 * DAY), Hopping(7 * DAY, HOUR), Calendar(7, "day", "UTC"), Calendar(1, "month", "Asia/Tokyo")]
)
def test_the_ends_of_time(window: Window) -> None:
    """Nothing overflows at the ends of int64, and starts still rise; a calendar's lie in the years that it has."""
    times = np.array([FIRST_US, FIRST_US + 1, FIRST_US + 10**12, -(10**18), 0, 10**18, 2**63 - 2, 2**63 - 1])
    found = starts(window, times)
    assert (np.diff(found) >= 0).all()
    assert (found <= times)[4 if isinstance(window, Calendar) else 0 :].all()
