"""The load test: how fast a running server answers, at which load, and whether one result differs from another.

Comes in: a ``LoadTest`` that says what to ask for and how hard. Goes out: a ``Result`` of rounds of histograms, which
can be kept as JSON, drawn and compared. It is a client: it knows the wire contract, and nothing of what is behind it.
"""

from __future__ import annotations

from featserve.load_test.compare import Comparison, compare
from featserve.load_test.histogram import Histogram
from featserve.load_test.result import Point, Result, Round
from featserve.load_test.run import LoadTest, describe_view, run
from featserve.load_test.source import Listed, Load, Range, Reads, Writes

__all__ = [
    "Comparison",
    "Histogram",
    "Listed",
    "Load",
    "LoadTest",
    "Point",
    "Range",
    "Reads",
    "Result",
    "Round",
    "Writes",
    "compare",
    "describe_view",
    "run",
]
