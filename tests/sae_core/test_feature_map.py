import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from sklearn.metrics import adjusted_rand_score

from sae_core.feature_map import build_feature_map
from sae_core.study import FeatureMapSettings


def grouped_rows(sizes: list[int], d_model: int = 24) -> tuple[torch.Tensor, np.ndarray]:
    generator = torch.Generator().manual_seed(0)
    group = np.repeat(np.arange(len(sizes)), sizes)
    centers = torch.randn(len(sizes), d_model, generator=generator)
    return centers[group] + 0.25 * torch.randn(len(group), d_model, generator=generator), group


Build = Callable[..., tuple[dict[str, Any], Any]]


@pytest.fixture
def build(tmp_path: Path, save_dictionary: Callable[[torch.Tensor], Path]) -> Build:
    """Makes the map of a dictionary with the given decoder rows, in a folder of the given name."""

    def build(rows: torch.Tensor, name: str = "map", **settings: Any) -> tuple[dict[str, Any], Any]:
        out = tmp_path / name
        out.mkdir()
        summary = build_feature_map(FeatureMapSettings(**settings), save_dictionary(rows), out)
        return summary, pq.read_table(out / "map.parquet")

    return build


def test_planted_groups_become_clusters_numbered_by_size_and_lie_together(build: Build) -> None:
    rows, group = grouped_rows([30, 90, 50])
    summary, table = build(rows)
    clusters = table["cluster"].to_numpy()
    assert summary == {"n_features": 170, "n_clusters": 3, "clustered": float((clusters >= 0).mean()), "placed": 1.0}
    assert adjusted_rand_score(group, clusters) > 0.95
    sizes = np.bincount(clusters[clusters >= 0])
    assert (np.diff(sizes) <= 0).all()
    points = np.stack([table["x"].to_numpy(), table["y"].to_numpy()], axis=1)
    distances = np.linalg.norm(points[:, None] - points[None], axis=2)
    np.fill_diagonal(distances, np.inf)
    assert (group[distances.argmin(1)] == group).mean() > 0.95


def test_a_crowd_and_one_group_apart_are_not_two_clusters(build: Build) -> None:
    generator = torch.Generator().manual_seed(0)
    crowd = torch.randn(600, 24, generator=generator)
    apart = 8 * torch.eye(24)[0] + torch.randn(24, generator=generator) + 0.1 * torch.randn(30, 24, generator=generator)
    summary, table = build(torch.cat([crowd, apart]))
    clusters = table["cluster"].to_numpy()
    assert summary["n_clusters"] > 5
    assert np.bincount(clusters[clusters >= 0]).max() <= 0.75 * 630
    (own,) = set(clusters[600:].tolist())
    assert own >= 0
    assert (clusters[:600] == own).mean() < 0.05


def test_the_same_seed_gives_the_same_bytes_and_another_seed_another_layout(build: Build, tmp_path: Path) -> None:
    rows, _ = grouped_rows([40, 40])
    _, first = build(rows, "first")
    build(rows, "second")
    _, other = build(rows, "other", seed=1)
    files = [(tmp_path / name / "map.parquet").read_bytes() for name in ("first", "second")]
    assert files[0] == files[1]
    assert not first["x"].equals(other["x"])


COUNT_THREADS = """
import sys, torch
from pathlib import Path
from sae_core.feature_map import build_feature_map
from sae_core.study import FeatureMapSettings
torch.set_num_threads(1)
build_feature_map(FeatureMapSettings(), Path(sys.argv[1]), Path(sys.argv[2]))
print(torch.get_num_threads())
"""


@pytest.mark.skipif(os.cpu_count() == 1, reason="one core: there is no other number of threads")
def test_what_is_computed_afterwards_has_as_many_threads_as_before(
    save_dictionary: Callable[[torch.Tensor], Path], tmp_path: Path
) -> None:
    """In a process of its own: numba sets the number once."""
    command = [sys.executable, "-c", COUNT_THREADS, save_dictionary(grouped_rows([20, 20])[0]), tmp_path]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "1\n"


@pytest.mark.parametrize("d_sae", [1, 2, 3, 10, 16, 17, 18])
def test_tiny_dictionaries_are_placed_too(build: Build, d_sae: int) -> None:
    rows = torch.randn(d_sae, 5, generator=torch.Generator().manual_seed(0))
    summary, table = build(rows)
    assert table["feature"].to_pylist() == list(range(d_sae))
    assert np.isfinite(table["x"].to_numpy()).all()
    assert np.isfinite(table["y"].to_numpy()).all()
    assert table["cluster"].to_numpy().min() >= -1
    assert summary["n_features"] == d_sae


def test_a_dictionary_of_copies_and_one_of_a_single_dimension_are_placed(build: Build) -> None:
    for name, rows in (("copies", torch.ones(60, 8)), ("line", torch.ones(40, 1))):
        _, table = build(rows, name)
        assert np.isfinite(table["x"].to_numpy()).all()


def test_a_cluster_size_above_the_dictionary_gives_no_clusters(build: Build) -> None:
    summary, _ = build(grouped_rows([20, 20])[0], min_cluster_size=100)
    assert (summary["n_clusters"], summary["clustered"]) == (0, 0)
