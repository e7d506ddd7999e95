"""A small model of departure delays, trained on a training frame and asked with served vectors: both are one matrix.

Comes in: a frame or a served matrix. Goes out: a fitted classifier, what it is worth on flights that it has not seen,
and the risk that a flight leaves late.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import numpy as np
import numpy.typing as npt
from sklearn.ensemble import HistGradientBoostingClassifier
from sklearn.metrics import roc_auc_score
from threadpoolctl import threadpool_limits

Matrix = npt.NDArray[np.float32]

LATE_MIN = 15
"""A flight is late if it leaves more than so many minutes after its schedule."""
SPLIT = datetime(2013, 10, 1, 4, tzinfo=UTC)
"""It learns from the flights before this instant, midnight in New York, and is judged by those from it on."""


@dataclass(frozen=True, slots=True)
class Judged:
    """What a model is worth on the flights after SPLIT.

    ``auc``: the chance that it holds a late flight for likelier to be late than one that is not. ``late``: the part of
    them that left late, and ``late_of_riskiest``: of the tenth that it thought most at risk.
    """

    learned_from: int
    judged_by: int
    auc: float
    late: float
    late_of_riskiest: float


def matrix_of(frame: Any, names: Sequence[str]) -> Matrix:
    """Return columns of a training frame as the tensor that would be served: float32, NaN for a null."""
    return np.column_stack([frame.column(name).to_numpy().astype(np.float32) for name in names])


def fit(frame: Any, names: Sequence[str]) -> tuple[HistGradientBoostingClassifier, Judged]:
    """Train on the flights of a frame that left before SPLIT, judge by the later ones; cancelled ones are left out."""
    delay = frame.column("departure_delay_min").to_numpy()
    departed = frame.column("scheduled_departure").to_numpy()
    left = np.isfinite(delay)
    before = departed < np.datetime64(SPLIT.replace(tzinfo=None), "us")
    features, late = matrix_of(frame, names), delay > LATE_MIN
    model = HistGradientBoostingClassifier(max_iter=100, early_stopping=False, random_state=0)
    with threadpool_limits(1):  # OpenMP's threads spin while they wait, which a busy machine pays for many times over
        model.fit(features[left & before], late[left & before])
    unseen = left & ~before
    risk, truth = risks(model, features[unseen]), late[unseen]
    riskiest = np.argsort(-risk)[: len(risk) // 10]
    return model, Judged(
        int((left & before).sum()),
        len(truth),
        float(roc_auc_score(truth, risk)),
        float(truth.mean()),
        float(truth[riskiest].mean()),
    )


def risks(model: HistGradientBoostingClassifier, features: Matrix) -> npt.NDArray[np.float64]:
    """Return for each row how likely the flight is to leave late, from 0 to 1."""
    return np.asarray(model.predict_proba(features)[:, 1])
