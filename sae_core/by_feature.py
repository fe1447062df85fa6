"""Rows of one feature out of a Parquet file of all features', without reading the others'. Light: pyarrow and numpy."""

from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

ROW_GROUP = 1024
"""Rows that are read to find one: files that are asked feature by feature are written in groups of so many."""

_KEPT = 16  # row groups kept in memory


class ByFeature:
    """A Parquet file with a column `feature`. Safe to use from several threads.

    What its row groups hold is read once, when it is opened. A file that was made anew must be opened again.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._metadata = pq.read_metadata(path)
        columns = [self._metadata.schema.column(i).path for i in range(self._metadata.num_columns)]
        self._low, self._high = self._bounds(columns.index("feature"))
        self._group = lru_cache(_KEPT)(self._read)

    def __len__(self) -> int:
        return int(self._metadata.num_rows)

    def table(self, feature: int) -> pa.Table:
        """The feature's rows, in the file's order."""
        groups = np.flatnonzero((self._low <= feature) & (feature <= self._high)).tolist()
        found = [self._of(feature, *self._group(group)) for group in groups]
        return pa.concat_tables(found) if found else self._group(0)[1].slice(0, 0)

    def rows(self, feature: int) -> list[dict[str, Any]]:
        """The feature's rows, in the file's order, by the columns' names."""
        found = self.table(feature)
        columns = [_values(column) for column in found.columns]
        return [dict(zip(found.column_names, row, strict=True)) for row in zip(*columns, strict=True)]

    @staticmethod
    def _of(feature: int, features: np.ndarray, table: pa.Table) -> pa.Table:
        at = np.flatnonzero(features == feature)
        if len(at) and at[-1] - at[0] + 1 == len(at):
            return table.slice(int(at[0]), len(at))
        return table.take(pa.array(at))

    def _read(self, group: int) -> tuple[np.ndarray, pa.Table]:
        """A row group, and its column `feature`."""
        with pq.ParquetFile(self._path, metadata=self._metadata, memory_map=True) as file:
            table = file.read_row_group(group, use_threads=False) if file.num_row_groups else file.read()
        return table["feature"].to_numpy(), table.combine_chunks()

    def _bounds(self, column: int) -> tuple[np.ndarray, np.ndarray]:
        """Least and largest feature of each row group; where the file does not say, any may be in it."""
        groups = (self._metadata.row_group(i).column(column) for i in range(self._metadata.num_row_groups))
        found = [(s.min, s.max) if (s := group.statistics) and s.has_min_max else (0, 2**62) for group in groups]
        bounds = np.array(found, np.int64).reshape(-1, 2)
        return bounds[:, 0], bounds[:, 1]


def _values(column: pa.ChunkedArray) -> list[Any]:
    """A column as a list; numbers in lists by way of numpy, which is much quicker than one by one."""
    kind = column.type
    if not pa.types.is_list(kind) or column.null_count or not pa.types.is_floating(kind.value_type):
        return column.to_pylist()
    found = []
    for chunk in column.chunks:
        values, cuts = chunk.values.to_numpy(zero_copy_only=False), chunk.offsets.to_numpy().tolist()
        found += [values[start:stop].tolist() for start, stop in pairwise(cuts)]
    return found
