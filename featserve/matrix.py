"""``FeatureMatrix``: the answer to one request, the same from a server, from an embedded store and in a training frame.

Knows NumPy; pyarrow and pandas only where an answer is turned into one of their frames.
"""

from __future__ import annotations

from enum import IntEnum
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from featserve.errors import unknown
from featserve.schema import FeatureSchema, ServiceSchema
from featserve.types import Array, Column, Mask, value_class

if TYPE_CHECKING:
    import pandas
    import pyarrow

Bytes8 = npt.NDArray[np.uint8]
Int64s = npt.NDArray[np.int64]


class Status(IntEnum):
    """Why a value is what it is; the numbers are the wire's."""

    PRESENT = 1
    NULL = 2
    NOT_FOUND = 3
    EXPIRED = 4


@value_class
class FeatureMatrix:
    """n rows of a service's features.

    ``values``: shape (n, schema.width), the schema's dtype, C order; a null is the feature's default, else NaN.
    ``columns``: the features that the tensor does not hold, in schema order. ``view_status``: uint8 ``Status`` of shape
    (n, views), never NULL. ``valid``: bool of shape (n, features), False where a feature has no value of its own; None
    where each has one. ``event_times``: int64 microseconds of shape (n, views), the least int64 where there is no row;
    None where they were not asked for.
    """

    schema: ServiceSchema
    values: Array
    columns: tuple[Column, ...]
    view_status: Bytes8
    valid: Mask | None
    event_times: Int64s | None

    def __len__(self) -> int:
        return len(self.view_status)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the columns of ``values``."""
        return self.schema.tensor_names

    @property
    def status(self) -> Bytes8:
        """The status of every value: uint8 ``Status`` of shape (n, features), features in schema order."""
        computed = len(self.schema.views)  # a transform's outputs are present unless they are null
        present = np.full((len(self), 1), Status.PRESENT, np.uint8)
        views = [computed if f.view is None else f.view for f in self.schema.features]
        result = np.hstack([self.view_status, present])[:, views]
        if self.valid is not None:
            result[(result == Status.PRESENT) & ~self.valid] = Status.NULL
        return result

    def part(self, start: int, stop: int) -> FeatureMatrix:
        """Return the rows from ``start`` up to ``stop``; they share their memory."""
        return FeatureMatrix(
            self.schema,
            self.values[start:stop],
            tuple([column.part(start, stop) for column in self.columns]),
            self.view_status[start:stop],
            None if self.valid is None else self.valid[start:stop],
            None if self.event_times is None else self.event_times[start:stop],
        )

    def column(self, name: str) -> Column:
        """Return the feature ``view.feature`` as a typed column, its default (else zero or NaN) where it is null.

        A float64 feature has the precision that the service declares.
        """
        for i, f in enumerate(self.schema.features):
            if f.name == name:
                return self._column(i, f)
        raise unknown("feature", name, [f.name for f in self.schema.features])

    def _column(self, i: int, f: FeatureSchema) -> Column:
        valid = None if self.valid is None else self.valid[:, i]
        if f.column is not None:
            col = self.columns[f.column]
            return Column(col.type, col.values, col.offsets, valid)
        assert f.tensor is not None
        values = self.values[:, f.tensor : f.tensor + f.type.length] if f.type.vector else self.values[:, f.tensor]
        if f.type.floating and not f.type.vector:
            return Column(self.schema.dtype, np.ascontiguousarray(values), None, valid)
        if valid is not None and not f.type.vector:  # NaN stands for a null and has no integer
            values = np.where(np.isnan(values), 0, values)
        return Column(f.type, np.ascontiguousarray(values.astype(f.type.dtype)), None, valid)

    def to_dict(self) -> dict[str, list[Any]]:
        """Return each feature's Python values by name: its default, else None, where it is null."""
        return {f.name: self._served(i, f).to_list() for i, f in enumerate(self.schema.features)}

    def to_arrow(self) -> pyarrow.Table:
        """Return a pyarrow Table with a column for each feature; its default, else null, where it is null."""
        import pyarrow

        from featserve.arrow import column_to_arrow

        names = [f.name for f in self.schema.features]
        return pyarrow.table([column_to_arrow(self._served(i, f)) for i, f in enumerate(self.schema.features)], names)

    def to_pandas(self) -> pandas.DataFrame:
        """Return a pandas DataFrame with a column for each feature.

        Integers and bools are of pandas' nullable dtypes, so that a null next to them costs no bits.
        """
        import pandas
        import pyarrow

        nullable = {
            pyarrow.bool_(): pandas.BooleanDtype(),
            pyarrow.int32(): pandas.Int32Dtype(),
            pyarrow.int64(): pandas.Int64Dtype(),
        }
        frame: pandas.DataFrame = self.to_arrow().to_pandas(types_mapper=nullable.get)
        return frame

    def _served(self, i: int, f: FeatureSchema) -> Column:
        """Return the column as it is served: valid wherever there is a value or a default."""
        col = self._column(i, f)
        return Column(col.type, col.values, col.offsets) if f.default_json else col
