import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from sae_core.features.examples import bins, draw
from sae_core.features.firings import extents
from sae_core.features.runs import rank


@given(st.lists(st.floats(2**-10, 1, width=32), min_size=1), st.integers(1, 50), st.floats(0.125, 100, width=32))
def test_bins_are_equally_wide_and_hold_their_upper_edge(shares: list[float], n: int, maximum: float) -> None:
    values = (np.array(shares, np.float32) * np.float32(maximum)).astype(np.float32)
    maxima = np.full(len(values), maximum, np.float32)
    found = bins(values, maxima, n)
    assert ((found >= 0) & (found < n)).all()
    share = values.astype(np.float64) / maxima
    assert (share <= (found + 1) / n + 1e-9).all()
    assert (share >= found / n - 1e-9).all()


def test_the_maximum_is_in_the_last_bin() -> None:
    values = np.array([0.1, 3.3, 1e-30, 1e30], np.float32)
    assert (bins(values, values, 7) == 6).all()


def test_draws_are_uniform_and_differ_with_every_part() -> None:
    places = np.arange(20_000)
    keys = [draw(seed, places * 0 + feature, places) for seed in (0, 1) for feature in (0, 1)]
    for key in keys:
        assert ((key >= 0) & (key < 1)).all()
        assert abs(key.mean() - 0.5) < 0.01
        assert abs(key.var() - 1 / 12) < 0.01
    assert abs(np.corrcoef(keys) - np.eye(4)).max() < 0.03
    assert (draw(0, places[:1], places[5:6]) == draw(0, places[:1] * 0, places[5:6])).all()


@given(st.lists(st.lists(st.integers(-1, 3), min_size=5, max_size=5), min_size=1, max_size=4))
def test_extents_are_the_runs_of_a_document(rows: list[list[int]]) -> None:
    first, last = extents(np.array(rows, np.int32))
    for row, low, high in zip(rows, first, last, strict=True):
        for i, document in enumerate(row):
            assert low[i] == next(j for j in range(i + 1) if all(d == document for d in row[j : i + 1]))
            assert high[i] == next((j for j in range(i, 5) if row[j] != document), 5)


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 2))))
def test_rank_counts_the_equal_rows_before(rows: list[tuple[int, int]]) -> None:
    rows.sort()
    columns = np.array(rows, np.int64).reshape(-1, 2)
    assert rank(columns[:, 0], columns[:, 1]).tolist() == [rows[:i].count(row) for i, row in enumerate(rows)]
