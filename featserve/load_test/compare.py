"""Whether one result differs from another, or whether the rounds of each differ as much among themselves.

Each round gives one value: a quantile, or an answer rate. If the two results were alike, it would not matter which
round belongs to which, so the difference of their means is held against those of other ways to deal out the rounds (a
permutation test, which assumes no distribution). Values are compared as logarithms: as ratios.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import combinations
from math import comb, exp, isfinite, log
from typing import Literal

import numpy as np

from featserve.errors import CallerError
from featserve.load_test.histogram import QUANTILES, samples_needed
from featserve.load_test.result import Point, Result, Round
from featserve.load_test.source import Load
from featserve.types import Array

Verdict = Literal["faster", "slower", "no difference", "cannot tell"]

ERROR_RATE = 0.05
"""How often two results that are alike may be told apart, over all the comparisons that are made at once."""
MEANINGFUL = 0.03
"""The least ratio that is called a difference, however sure it is: 3 %."""
MAX_DEALT = 20_000
INTERVAL_STEPS = 30
WIDEST = log(100.0)

Measure = Callable[[Round], float]


@dataclass(frozen=True, slots=True)
class Comparison:
    """One measure of one load, in both results.

    ``ratio``: of the second to the first, with its 95 % interval ``low`` to ``high``. ``chance``: how often dealing out
    the rounds at random gives at least this difference; 1 - ``chance`` is the confidence that there is one.
    ``drifting``: the results ("A", "B") whose first rounds differ from their last ones: they do not tell the noise.
    """

    load: Load
    measure: str
    first: float
    second: float
    ratio: float
    low: float
    high: float
    chance: float
    verdict: Verdict
    drifting: tuple[str, ...] = ()


def compare(first: Result, second: Result) -> list[Comparison]:
    """Return the comparisons of each load that is in both results; raises CallerError where there is none.

    A quantile is compared where both results have samples enough to tell it. ``first`` is what ``second`` is held to.
    """
    others = {point.load: point for point in second.points}
    pairs = [(point, others[point.load]) for point in first.points if point.load in others]
    if not pairs:
        raise CallerError("the results have no load in common: the same batch, rate and connections are compared")
    wanted = [(a, b, *measure) for a, b in pairs for measure in _measures(a, b)]
    return [_compare(a, b, name, measure, ERROR_RATE / len(wanted)) for a, b, name, measure in wanted]


def _measures(a: Point, b: Point) -> list[tuple[str, Measure]]:
    samples = min(a.total().latency.count, b.total().latency.count)
    measures: list[tuple[str, Measure]] = [
        (name, _quantile_us(quantile)) for name, quantile in QUANTILES.items() if samples >= samples_needed(quantile)
    ]
    if a.load.rate is None:
        measures.append(("answers/s", lambda r: r.answered / r.seconds))
    return measures


def _quantile_us(quantile: float) -> Measure:
    return lambda r: r.latency.quantile_ns(quantile) / 1e3


def _compare(a: Point, b: Point, name: str, measure: Measure, error_rate: float) -> Comparison:
    x, y = _logarithms(map(measure, a.rounds)), _logarithms(map(measure, b.rounds))
    if min(len(x), len(y)) == 0:
        nan = float("nan")
        return Comparison(a.load, name, nan, nan, nan, nan, nan, 1.0, "cannot tell")
    shift = float(y.mean() - x.mean())
    dealt = _deal(len(x), len(y))
    chance = _chance(x, y, dealt)
    low, high = _interval(x, y, dealt, shift)
    drifting = tuple(label for label, z in (("A", x), ("B", y)) if _drifts(z, error_rate))
    verdict: Verdict = "no difference"
    if 2 / comb(len(x) + len(y), len(x)) > error_rate:
        verdict = "cannot tell"  # even the most uneven rounds would be dealt out so too often
    elif chance <= error_rate and abs(shift) >= log(1 + MEANINGFUL):
        better = shift > 0 if name == "answers/s" else shift < 0
        verdict = "faster" if better else "slower"
    first, second = exp(float(x.mean())), exp(float(y.mean()))
    return Comparison(a.load, name, first, second, exp(shift), exp(low), exp(high), chance, verdict, drifting)


def _logarithms(values: Iterable[float]) -> Array:
    """Return the logarithms of the rounds that have a value."""
    return np.array([log(value) for value in values if isfinite(value) and value > 0])


def _deal(first: int, second: int) -> Array:
    """Return ways to deal out rounds, 1 or 0 of shape (ways, rounds): all, or 20,000 random ones with the true one."""
    rounds = first + second
    if comb(rounds, first) <= MAX_DEALT:
        chosen = np.array(list(combinations(range(rounds), first)))
    else:
        random = np.random.default_rng(0)
        chosen = np.argsort(random.random((MAX_DEALT, rounds)), axis=1)[:, :first]
        chosen[0] = np.arange(first)
    dealt = np.zeros((len(chosen), rounds))
    np.put_along_axis(dealt, chosen, 1.0, axis=1)
    return dealt


def _chance(x: Array, y: Array, dealt: Array) -> float:
    """Return the part of the ways whose means differ at least as much as those of x and y."""
    pooled = np.concatenate([x, y])
    inside = dealt @ pooled
    differences = np.abs((pooled.sum() - inside) / len(y) - inside / len(x))
    return float(np.mean(differences >= abs(y.mean() - x.mean()) - 1e-12))


def _interval(x: Array, y: Array, dealt: Array, shift: float) -> tuple[float, float]:
    """Return the least and the greatest difference which, taken off y, leaves no difference at 95 %."""
    ends: list[float] = []
    for outside in (-WIDEST, WIDEST):
        inside, outer = shift, shift + outside
        for _ in range(INTERVAL_STEPS):
            middle = (inside + outer) / 2
            if _chance(x, y - middle, dealt) > 0.05:
                inside = middle
            else:
                outer = middle
        ends.append(inside)
    return ends[0], ends[1]


def _drifts(z: Array, error_rate: float) -> bool:
    """Say whether the first half of the rounds differs from the second more than their order's chance."""
    half = len(z) // 2
    if half < 2:
        return False
    return _chance(z[:half], z[half:], _deal(half, len(z) - half)) <= max(error_rate, 0.01) and (
        abs(z[:half].mean() - z[half:].mean()) >= log(1 + MEANINGFUL)
    )
