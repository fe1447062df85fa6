from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sae_core.by_feature import ByFeature

ROWS = [
    {"feature": i // 3, "text": f"{i}", "acts": [i / 2, 0.25], "tags": None if i == 4 else ["a"] * (i % 3)}
    for i in range(30)
] + [{"feature": 12, "text": "after a gap", "acts": [], "tags": []}]  # fmt: skip


@pytest.mark.parametrize("group", [1, 2, 7, 1000])
@pytest.mark.parametrize("statistics", [True, False])
def test_the_rows_of_a_feature_are_found_however_the_file_is_cut(tmp_path: Path, group: int, statistics: bool):
    table = pa.Table.from_pylist(ROWS)
    pq.write_table(table, tmp_path / "rows.parquet", row_group_size=group, write_statistics=statistics)
    file = ByFeature(tmp_path / "rows.parquet")
    assert len(file) == len(ROWS)
    for feature in (-1, *range(14)):
        assert file.rows(feature) == [row for row in ROWS if row["feature"] == feature]


def test_rows_that_are_not_in_order_are_found(tmp_path: Path):
    pq.write_table(pa.Table.from_pylist(ROWS[::-1] + ROWS), tmp_path / "rows.parquet", row_group_size=5)
    found = ByFeature(tmp_path / "rows.parquet").rows(3)
    assert found == [row for row in ROWS[::-1] + ROWS if row["feature"] == 3]


def test_a_file_without_rows_holds_no_feature(tmp_path: Path):
    pq.write_table(pa.Table.from_pylist(ROWS[:0] or [], pa.Table.from_pylist(ROWS).schema), tmp_path / "rows.parquet")
    file = ByFeature(tmp_path / "rows.parquet")
    assert (len(file), file.rows(0)) == (0, [])
