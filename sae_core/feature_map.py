"""A picture of the dictionary: features with similar decoder rows lie near each other, in clusters.

The picture is UMAP (McInnes et al. 2018) in two dimensions with cosine distance; the clusters are HDBSCAN's on a
second UMAP in ten dimensions, as in Bricken et al. 2023, because two dimensions tear and crush groups. Both start
from the same neighborhoods, found by the neighbor index. Dead features have decoder rows too, so all are placed.
"""

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float32, Int64
from sklearn.cluster import HDBSCAN

from sae_core.artifacts import write_atomically
from sae_core.by_feature import ROW_GROUP
from sae_core.dictionary import Dictionary
from sae_core.neighbors import Rows, build_index, nearest, unit_rows
from sae_core.progress import Report, silent
from sae_core.study import FeatureMapSettings, NeighborSettings

with warnings.catch_warnings():
    warnings.filterwarnings("ignore", "Tensorflow not installed", ImportWarning)  # for parametric UMAP: not used
    from umap import UMAP

MAP = "map.parquet"

_CLUSTER_DIMENSIONS = 10  # Bricken et al. 2023
_CLUSTER_MIN_DIST = 0.1  # Bricken et al. 2023
_MIN_SAMPLES = 3  # neighbors that density is judged by: Bricken et al. 2023, where it is the least size of a cluster
_LARGEST = 0.75  # of all features: one of more is no group but the rest of them, and is looked into

Neighborhoods = tuple[Int64[np.ndarray, "n neighbors"], Float32[np.ndarray, "n neighbors"]]


def build_feature_map(
    settings: FeatureMapSettings, dictionary: Path, folder: Path, report: Report = silent
) -> dict[str, Any]:
    """Write `map.parquet` (feature, x, y, cluster) into `folder`; clusters count from 0, the largest first, -1 is none.

    A dictionary too small for UMAP's neighborhoods is laid out on its two principal axes, without clusters.
    """
    rows = unit_rows(Dictionary.load(dictionary))
    n = len(rows)
    report(0, n, "features")
    if n < settings.n_neighbors + 2:
        layout, clusters = _principal_axes(rows, 2), np.full(n, -1)
    else:
        near = _neighborhoods(rows, settings.n_neighbors)
        layout = _umap(rows, near, 2, settings.min_dist, settings.seed)
        report(n // 2, n, "features")
        spread = _umap(rows, near, _CLUSTER_DIMENSIONS, _CLUSTER_MIN_DIST, settings.seed)
        clusters = _clusters(spread, settings.min_cluster_size)
    columns = {
        "feature": np.arange(n, dtype=np.int32),
        "x": layout[:, 0],
        "y": layout[:, 1],
        "cluster": clusters.astype(np.int32),
    }
    with write_atomically(folder / MAP) as path:
        pq.write_table(pa.table(columns), path, row_group_size=8 * ROW_GROUP)
    report(n, n, "features")
    return {
        "n_features": n,
        "n_clusters": int(clusters.max() + 1),
        "clustered": float((clusters >= 0).mean()),
        "placed": float(np.isfinite(layout).all(axis=1).mean()),
    }


def _neighborhoods(rows: Rows, n_neighbors: int) -> Neighborhoods:
    """Each feature's nearest ones and their cosine distances, itself first, as UMAP wants them."""
    features = np.arange(len(rows))
    cosines, neighbors = nearest(build_index(rows, NeighborSettings()), rows, features, n_neighbors - 1)
    distances = np.hstack([np.zeros((len(rows), 1), np.float32), 1 - cosines])
    return np.hstack([features[:, None], neighbors]), distances


def _umap(
    rows: Rows, near: Neighborhoods, dimensions: int, min_dist: float, seed: int
) -> Float32[np.ndarray, "n dimensions"]:
    """UMAP coordinates. A seed, one thread and principal axes as the start make it repeat exactly."""
    start = _principal_axes(rows, dimensions)
    start += np.random.default_rng(seed).normal(scale=1e-4, size=start.shape)  # sets copies, and empty axes, apart
    umap = UMAP(
        n_neighbors=near[0].shape[1], n_components=dimensions, min_dist=min_dist, metric="cosine", init=start,
        precomputed_knn=(*near, None), random_state=seed, n_jobs=1,
    )  # fmt: skip
    threads = torch.get_num_threads()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "precomputed_knn", UserWarning)  # no transform() of new points is made
            return umap.fit_transform(rows)
    finally:
        torch.set_num_threads(threads)  # numba gives the process as many as there are cores, and sums round otherwise


def _clusters(points: Float32[np.ndarray, "n dimensions"], min_cluster_size: int) -> Int64[np.ndarray, " n"]:
    """HDBSCAN clusters, numbered by size (the first feature decides between equal sizes); -1 is none."""
    if len(points) < min_cluster_size:
        return np.full(len(points), -1)
    largest = max(int(_LARGEST * len(points)), min_cluster_size)
    hdbscan = HDBSCAN(min_cluster_size, min_samples=_MIN_SAMPLES, max_cluster_size=largest, copy=False)
    found = hdbscan.fit_predict(points.astype(np.float64))
    ids, first, sizes = np.unique(found[found >= 0], return_index=True, return_counts=True)
    number = np.full(len(ids) + 1, -1)  # the last entry is for those without a cluster
    number[ids[np.lexsort((first, -sizes))]] = np.arange(len(ids))
    return number[found]


def _principal_axes(rows: Rows, dimensions: int) -> Float32[np.ndarray, "n dimensions"]:
    """Coordinates on the first principal axes, largest variance first; axes beyond d_model are 0."""
    centered = rows - rows.mean(0)
    _, axes = np.linalg.eigh(centered.T @ centered)  # rising variance
    layout = np.zeros((len(rows), dimensions), np.float32)
    width = min(dimensions, rows.shape[1])
    layout[:, :width] = centered @ axes[:, ::-1][:, :width]
    return layout
