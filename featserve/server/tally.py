"""How many rows and values of a service's answers have which status, counted view by view.

Comes in: answers. Goes out: running counts, for metrics and spans. The common answer, where every row is present and no
value is null, costs one look at a flag: ``engine.fill`` gives an answer ``valid`` unless all its rows are whole.
"""

from __future__ import annotations

import numpy as np

from featserve.matrix import FeatureMatrix, Status
from featserve.plan import Place, ReadPlan
from featserve.wire import pack_rows


class Tally:
    """Counts of one service version's answers.

    ``rows``: rows asked for. ``not_found`` and ``expired``: of those, the rows that each view did not have, views in
    the schema's order. ``nulls``: the served values of each view that were null in a row that it had.
    """

    def __init__(self, plan: ReadPlan) -> None:
        self.schema = plan.schema
        views, features = len(plan.views), len(plan.schema.features)
        self._served = [_mark(view.targets, features) for view in plan.views]
        """The bits of a row that are each view's."""
        self.rows = 0
        self.not_found, self.expired, self.nulls = [0] * views, [0] * views, [0] * views

    def add(self, matrix: FeatureMatrix) -> None:
        """Count the rows of an answer."""
        self.rows += len(matrix)
        if matrix.valid is not None:
            self.add_missing(matrix.view_status.tobytes(), pack_rows(matrix.valid))

    def add_missing(self, status: bytes, validity: bytes) -> None:
        """Count what is missing in rows that are counted. ``status``: rows x views. ``validity``: see ``pack_rows``."""
        views, rest = len(self._served), bytes(-len(validity) % 8)
        valid = np.frombuffer(validity + rest, np.uint64)
        for i, served in enumerate(self._served):
            column = status[i::views]
            not_found, expired = column.count(Status.NOT_FOUND), column.count(Status.EXPIRED)
            self.not_found[i] += not_found
            self.expired[i] += expired
            # Of a row that a view does not have none is valid.
            asked = (len(column) - not_found - expired) * int.from_bytes(served, "little").bit_count()
            mine = valid & np.frombuffer(served * len(column) + rest, np.uint64)
            self.nulls[i] += asked - int(np.bitwise_count(mine).sum())


def _mark(place: Place, features: int) -> bytes:
    """Return as bits which of the features of a row are in this place."""
    marked = np.zeros((1, features), np.bool_)
    marked[:, place] = True
    return pack_rows(marked)
