"""How many rows and values of a service's answers have which status, counted view by view.

Comes in: answers. Goes out: running counts, for metrics and spans. The common answer, where every row is present and no
value is null, costs one look at a flag: ``engine.fill`` gives an answer ``valid`` unless all its rows are whole.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from featserve.matrix import FeatureMatrix, Status
from featserve.plan import Place, ReadPlan
from featserve.types import Array, Mask

FEW = 128
"""Values that are counted faster as bytes than by NumPy."""


class Tally:
    """Counts of one service version's answers.

    ``rows``: rows asked for. ``not_found`` and ``expired``: of those, the rows that each view did not have, views in
    the schema's order. ``nulls``: the served values of each view that were null in a row that it had.
    """

    def __init__(self, plan: ReadPlan) -> None:
        self.schema = plan.schema
        self._targets = [view.targets for view in plan.views]
        views = len(plan.views)
        self.rows = 0
        self.not_found, self.expired, self.nulls = [0] * views, [0] * views, [0] * views

    def add(self, matrix: FeatureMatrix) -> None:
        """Count the rows of an answer."""
        if matrix.valid is None:
            self.rows += len(matrix)
        else:
            self.add_rows(matrix.view_status, self.valid(matrix.valid))

    def valid(self, valid: Mask) -> list[int]:
        """Return how many values of each view are not null. ``valid``: rows x features."""
        if valid.size > FEW:
            return [int(np.count_nonzero(valid[:, targets])) for targets in self._targets]
        return [valid[:, targets].tobytes().count(1) for targets in self._targets]

    def add_rows(self, status: Array, valid: Sequence[int]) -> None:
        """Count rows. ``status``: uint8, rows x views. ``valid``: how many values of each view are not null."""
        self.rows += len(status)
        for i, (targets, values) in enumerate(zip(self._targets, valid, strict=True)):
            column = status[:, i].tobytes()
            not_found, expired = column.count(Status.NOT_FOUND), column.count(Status.EXPIRED)
            self.not_found[i] += not_found
            self.expired[i] += expired
            # Of a row that a view does not have none is valid.
            self.nulls[i] += (len(status) - not_found - expired) * _size(targets) - values


def _size(place: Place) -> int:
    return place.stop - place.start if isinstance(place, slice) else len(place)
