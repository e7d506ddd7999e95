"""Results: kept, drawn, and told apart where noise alone does not explain their difference."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from featserve.errors import CallerError
from featserve.load_test import (
    Comparison,
    Histogram,
    Load,
    Point,
    Result,
    Round,
    compare,
)
from featserve.load_test.plot import check_plot, figure_of
from tests.command_line import run as run_verb


def recorded(values: Any) -> Histogram:
    histogram = Histogram()
    for value in np.asarray(values).tolist():
        histogram.record(value)
    return histogram


def result_of(scale: float, seed: int, rounds: int = 10, noise: float = 0.05, rate: float | None = 500.0) -> Result:
    """Return a result whose rounds are noisy around latencies of ``scale`` ms."""
    random = np.random.default_rng(seed)
    made: list[Round] = []
    for level in scale * np.exp(random.normal(0, noise, rounds)):
        made.append(Round(3.0, recorded((level * random.lognormal(13.8, 0.4, 1_500)).astype(np.int64))))
        made[-1].arrived = made[-1].answered = round(1_500 / (level if rate is None else 1))
    return Result(0, "score@1#0", 1.0, {}, (Point(Load(1, rate, 8), made),))


def verdicts(first: Result, second: Result) -> dict[str, Comparison]:
    return {c.measure: c for c in compare(first, second)}


def test_results_that_are_alike_are_no_different() -> None:
    """Of 25 pairs of results that differ by noise alone, at most the promised few are told apart."""
    told = 0
    for seed in range(25):
        found = verdicts(result_of(1.0, 2 * seed), result_of(1.0, 2 * seed + 1))
        assert set(found) == {"p50", "p90", "p99"}
        told += any(c.verdict != "no difference" for c in found.values())
    assert told <= 5  # 1 is expected; more than 5 come once in 1,000


def test_a_difference_is_told() -> None:
    """20 % more latency is slower, its reverse faster, with an interval that holds it."""
    first, second = result_of(1.0, 1), result_of(1.2, 2)
    for name, c in verdicts(first, second).items():
        assert c.verdict == "slower", name
        assert c.low < 1.2 < c.high
        assert c.low > 1
        assert c.chance < 0.01
    assert {c.verdict for c in compare(second, first)} == {"faster"}


def test_throughput_counts_the_other_way() -> None:
    """Fewer answers a second is slower; they are compared in a closed loop only."""
    found = verdicts(result_of(1.0, 1, rate=None), result_of(1.3, 2, rate=None))
    assert found["answers/s"].verdict == "slower"
    assert found["answers/s"].ratio < 1
    assert "answers/s" not in verdicts(result_of(1.0, 1), result_of(1.0, 2))


def test_a_sure_but_small_difference_is_none() -> None:
    """1 % is no difference, however quiet the rounds are."""
    for c in compare(result_of(1.0, 1, noise=0.0001), result_of(1.01, 2, noise=0.0001)):
        assert c.verdict == "no difference"


def test_too_few_rounds_tell_nothing() -> None:
    """Three rounds each are not enough to call even a doubling a difference."""
    first, second = result_of(1.0, 1, rounds=3), result_of(2.0, 2, rounds=3)
    assert {c.verdict for c in compare(first, second)} == {"cannot tell"}


def test_quantiles_of_few_samples_are_not_compared() -> None:
    """A p99 is compared only where both results have the samples for one."""
    assert "p99" not in verdicts(result_of(1.0, 1, rounds=10), result_of(1.0, 2, rounds=6))


def test_drift_is_told() -> None:
    """A result whose later rounds are slower than its earlier ones is named."""
    steady, drifting = result_of(1.0, 1), result_of(1.0, 2)
    (point,) = drifting.points
    later = result_of(1.5, 3).points[0].rounds[5:]
    drifting = replace(drifting, points=(Point(point.load, [*point.rounds[:5], *later]),))
    assert all(c.drifting == ("B",) for c in compare(steady, drifting))


def test_results_of_other_loads_are_not_compared() -> None:
    """Results without a load in common are refused."""
    with pytest.raises(CallerError, match="no load in common"):
        compare(result_of(1.0, 1, rate=100), result_of(1.0, 1, rate=200))


def test_the_verb_says_which_result_is_slower(tmp_path: Path) -> None:
    """The command line says of each measure whether B is slower or faster, how sure that is, and nothing else."""
    a, b = tmp_path / "a.json", tmp_path / "b.json"
    result_of(1.0, 1).save(a)
    result_of(1.2, 2).save(b)
    shown = run_verb("load-test", "compare", a, b)
    assert [line.split()[-1] for line in shown.stdout.splitlines() if "500" in line] == ["slower"] * 3
    assert shown.stderr == ""
    assert run_verb("load-test", "compare", b, a).stdout.count("faster") == 3
    for c in json.loads(run_verb("load-test", "compare", "--json", a, b).stdout):
        assert (c["batch"], c["rate"], c["connections"], c["verdict"], c["drifting"]) == (1, 500.0, 8, "slower", [])
        assert c["interval"][0] < 1.2 < c["interval"][1]
        assert c["ratio"] == pytest.approx(c["b"] / c["a"])
        assert c["chance"] < 0.01


def test_the_verb_doubts_what_was_not_measured_alike(tmp_path: Path) -> None:
    """Settings that differ and rounds that drift are named beside the verdicts; without a common load is an error."""
    a, b, other = (tmp_path / name for name in ("a.json", "b.json", "other.json"))
    replace(result_of(1.0, 1), settings={"processes": 1, "seed": 1}).save(a)
    (point,) = result_of(1.0, 2).points
    rounds = [*point.rounds[:5], *result_of(1.5, 3).points[0].rounds[5:]]
    replace(result_of(1.0, 2), settings={"processes": 2, "seed": 2}, points=(Point(point.load, rounds),)).save(b)
    result_of(1.0, 1, rate=200).save(other)
    told = run_verb("load-test", "compare", a, b).stderr
    assert "not measured alike: processes differ" in told
    assert "the rounds of B drift" in told
    assert "no load in common" in run_verb("load-test", "compare", a, other, code=1).stderr


def test_a_result_is_kept(tmp_path: Path) -> None:
    """A saved result is read back with the same rounds; its summary has no quantile of too few samples."""
    result = result_of(1.0, 1)
    result.points[0].rounds[0].errors["UNAVAILABLE"] = 3
    result.save(tmp_path / "a.json")
    again = Result.load(tmp_path / "a.json")
    assert again.to_json() == result.to_json()
    assert compare(result, again)[0].ratio == 1
    summary = json.loads((tmp_path / "a.json").read_text())["points"][0]["summary"]
    assert summary["latency_us"]["p99"] > summary["latency_us"]["p50"]
    assert summary["latency_us"]["p99.9"] is None
    assert summary["errors"] == {"UNAVAILABLE": 3}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2}', '{"format": 1, "points": [{"load": {}}]}'])
def test_what_is_no_result_is_refused(text: str, tmp_path: Path) -> None:
    """A file that is no result is a message, not a traceback."""
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(CallerError, match=r"a\.json"):
        Result.load(tmp_path / "a.json")


def test_a_plot_shows_what_is_told(tmp_path: Path) -> None:
    """A line stands for each quantile that has the samples, at its latency; a path that is none is refused at once."""
    figure = figure_of(result_of(1.0, 1))
    labelled = {line.get_label(): line for line in figure.axes[0].lines if not line.get_label().startswith("_")}
    assert set(labelled) == {"p50, 1 row a request", "p99, 1 row a request"}
    median_us = labelled["p50, 1 row a request"].get_ydata()[0]
    assert median_us == pytest.approx(np.exp(13.8) / 1e3, rel=0.1)
    figure.savefig(tmp_path / "a.png")
    with pytest.raises(CallerError, match="png"):
        check_plot(tmp_path / "a.txt")
