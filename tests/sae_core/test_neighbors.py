from collections.abc import Callable
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from sae_core.neighbors import build_index, build_neighbors, nearest, recall
from sae_core.study import NeighborSettings


def random_rows(d_sae: int, d_model: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randn(d_sae, d_model, generator=torch.Generator().manual_seed(seed))


Build = Callable[..., tuple[dict[str, Any], list[dict[str, Any]]]]


@pytest.fixture
def build(tmp_path: Path, save_dictionary: Callable[[torch.Tensor], Path]) -> Build:
    """Finds the neighbors in a dictionary with the given decoder rows."""

    def build(rows: torch.Tensor, **settings: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        out = tmp_path / "neighbors"
        out.mkdir()
        summary = build_neighbors(NeighborSettings(**settings), save_dictionary(rows), out)
        return summary, pq.read_table(out / "neighbors.parquet").to_pylist()

    return build


def true_neighbors(rows: torch.Tensor, count: int) -> tuple[np.ndarray, np.ndarray]:
    unit = rows.double().numpy() / np.linalg.norm(rows.double().numpy(), axis=1, keepdims=True)
    cosines = unit @ unit.T
    np.fill_diagonal(cosines, -np.inf)
    order = np.argsort(-cosines, axis=1)[:, :count]
    return order, np.take_along_axis(cosines, order, axis=1)


@pytest.mark.parametrize("exact_up_to", [1000, 10])
def test_neighbors_agree_with_all_pairs_in_numpy(build: Build, exact_up_to: int) -> None:
    rows = random_rows(300)
    summary, table = build(rows, count=7, exact_up_to=exact_up_to)
    order, cosines = true_neighbors(rows, 7)
    assert summary["index"] == ("exact" if exact_up_to == 1000 else "hnsw")
    assert summary["recall_at_10"] == 1
    assert [(r["feature"], r["rank"]) for r in table] == [(i, rank) for i in range(300) for rank in range(1, 8)]
    np.testing.assert_array_equal([r["neighbor"] for r in table], order.ravel())
    np.testing.assert_allclose([r["cosine"] for r in table], cosines.ravel(), atol=1e-6)


def test_a_feature_is_never_its_own_neighbor_even_among_copies(build: Build) -> None:
    rows = random_rows(40)
    rows[5:30] = rows[5]
    summary, table = build(rows, count=12)
    assert all(r["feature"] != r["neighbor"] for r in table)
    assert all(r["cosine"] <= 1 for r in table)
    assert {r["neighbor"] for r in table if r["feature"] == 5} <= set(range(5, 30))
    assert summary["recall_at_10"] == 1


@pytest.mark.parametrize(("d_sae", "n_rows", "recall_at_10"), [(1, 0, 1.0), (2, 2, 1.0), (5, 20, 1.0)])
def test_a_tiny_dictionary_has_all_others_as_neighbors(
    build: Build, d_sae: int, n_rows: int, recall_at_10: float | None
) -> None:
    summary, table = build(random_rows(d_sae))
    assert len(table) == n_rows
    assert summary["recall_at_10"] == recall_at_10


def test_recall_of_a_poor_graph_is_below_one_and_agrees_with_counting() -> None:
    rows = torch.nn.functional.normalize(random_rows(900, 64), dim=1).numpy()
    settings = NeighborSettings(exact_up_to=1, hnsw_links=4, hnsw_search=8)
    index = build_index(rows, settings)
    _, found = nearest(index, rows, np.arange(900), 10)
    order, _ = true_neighbors(torch.from_numpy(rows), 10)
    by_counting = np.mean([len(set(f) & set(o)) / 10 for f, o in zip(found, order, strict=True)])
    assert by_counting < 0.95
    assert recall(index, rows) == pytest.approx(by_counting, abs=1e-3)


def test_the_graph_is_the_same_bytes_each_time_and_the_saved_index_answers(
    tmp_path: Path, save_dictionary: Callable[[torch.Tensor], Path]
) -> None:
    rows = random_rows(500)
    dictionary = save_dictionary(rows)
    contents = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        build_neighbors(NeighborSettings(exact_up_to=1), dictionary, tmp_path / name)
        contents.append([(tmp_path / name / f).read_bytes() for f in ("decoder.faiss", "neighbors.parquet")])
    assert contents[0] == contents[1]
    index = faiss.read_index(str(tmp_path / "a" / "decoder.faiss"))
    unit = torch.nn.functional.normalize(rows, dim=1).numpy()
    assert index.search(unit[:5], 1)[1].ravel().tolist() == [0, 1, 2, 3, 4]


def test_progress_ends_at_the_number_of_features(
    tmp_path: Path, save_dictionary: Callable[[torch.Tensor], Path]
) -> None:
    told = []
    (tmp_path / "out").mkdir()
    dictionary = save_dictionary(random_rows(1500))
    build_neighbors(NeighborSettings(), dictionary, tmp_path / "out", lambda done, total, unit, **_: told.append(done))
    assert told == [1024, 1500]
