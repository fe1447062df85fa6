"""Nearest features: those whose decoder rows point the same way (Templeton et al. 2024, feature neighborhoods).

A FAISS index over unit rows, exact while that is cheap and a graph (HNSW, Malkov and Yashunin 2018) above, whose
recall is measured against exact search on a sample and recorded either way.
"""

from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float32, Int64

from sae_core.artifacts import write_atomically
from sae_core.by_feature import ROW_GROUP
from sae_core.dictionary import Dictionary
from sae_core.neighbor_index import INDEX
from sae_core.progress import Report, silent
from sae_core.study import NeighborSettings

NEIGHBORS = "neighbors.parquet"

_BATCH = 1024  # rows searched at once
_SAMPLE = 1000  # features on which recall is measured
_RECALL_AT = 10
_TIE = 1e-5  # cosines closer than float32 sums can tell apart count as equal

Rows = Float32[np.ndarray, "d_sae d_model"]
Found = tuple[Float32[np.ndarray, "queries count"], Int64[np.ndarray, "queries count"]]


def build_neighbors(
    settings: NeighborSettings, dictionary: Path, folder: Path, report: Report = silent
) -> dict[str, Any]:
    """Write the index (`decoder.faiss`) and the table of nearest features (`neighbors.parquet`) into `folder`.

    The table has feature, rank (from 1), neighbor and cosine; a feature is no neighbor of its own.

    Returns:
        The kind of index and its recall@10 on a seeded sample (1 for fewer than two features: none is missed).
    """
    rows = unit_rows(Dictionary.load(dictionary))
    index = build_index(rows, settings)
    cosines, neighbors = nearest(index, rows, np.arange(len(rows)), settings.count, report)
    with write_atomically(folder / INDEX) as path:
        faiss.write_index(index, str(path))
    with write_atomically(folder / NEIGHBORS) as path:
        pq.write_table(_table(cosines, neighbors), path, row_group_size=8 * ROW_GROUP)  # rows are short
    return {
        "n_features": len(rows),
        "index": "exact" if len(rows) <= settings.exact_up_to else "hnsw",
        "recall_at_10": recall(index, rows),
    }


def unit_rows(dictionary: Dictionary) -> Rows:
    """Decoder rows of length 1 (a zero row stays zero), in memory that FAISS can read."""
    rows = dictionary.W_dec.detach().float().cpu().numpy()
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.ascontiguousarray(rows / np.where(norms > 0, norms, 1))


def build_index(rows: Rows, settings: NeighborSettings) -> faiss.Index:
    """An index for inner products with `rows`: exact up to `settings.exact_up_to` rows, else an HNSW graph."""
    if len(rows) <= settings.exact_up_to:
        exact = faiss.IndexFlatIP(rows.shape[1])
        exact.add(rows)
        return exact
    index = faiss.IndexHNSWFlat(rows.shape[1], settings.hnsw_links, faiss.METRIC_INNER_PRODUCT)
    index.hnsw.efSearch = settings.hnsw_search
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)  # the graph hangs on the order in which rows arrive: one thread, same bytes
    try:
        index.add(rows)
    finally:
        faiss.omp_set_num_threads(threads)
    return index


def nearest(
    index: faiss.Index, rows: Rows, features: Int64[np.ndarray, " queries"], count: int, report: Report = silent
) -> Found:
    """Cosine and number of the `count` features nearest to each of `features`, itself left out, nearest first."""
    count = min(count, len(rows) - 1)
    cosines, neighbors = np.empty((len(features), count), np.float32), np.empty((len(features), count), np.int64)
    if not count:
        return cosines, neighbors
    for start in range(0, len(features), _BATCH):
        batch = slice(start, start + _BATCH)
        found, which = index.search(rows[features[batch]], count + 1)
        cosines[batch], neighbors[batch] = _without_self(found, which, features[batch])
        report(min(start + _BATCH, len(features)), len(features), "features")
    return cosines.clip(-1, 1), neighbors


def _without_self(cosines: np.ndarray, neighbors: np.ndarray, features: np.ndarray) -> Found:
    """Drop each query from its own answer, or the last one where the query is not in it (copies of one row)."""
    own = neighbors == features[:, None]
    own[~own.any(1), -1] = True
    shape = len(features), neighbors.shape[1] - 1
    return cosines[~own].reshape(shape), neighbors[~own].reshape(shape)


def recall(index: faiss.Index, rows: Rows) -> float:
    """Share of the true ten nearest that the index finds, over a seeded sample of features.

    A neighbor counts as true when its cosine reaches that of the tenth nearest, so equal rows do not count as misses.
    """
    if len(rows) < 2:
        return 1.0
    sample = np.sort(np.random.default_rng(0).permutation(len(rows))[:_SAMPLE])
    count = min(_RECALL_AT, len(rows) - 1)
    _, neighbors = nearest(index, rows, sample, count)
    hits = 0
    for feature, found in zip(sample, neighbors, strict=True):
        exact = rows @ rows[feature]
        others = np.delete(exact, feature)
        tenth = np.partition(others, len(others) - count)[len(others) - count]
        hits += int((exact[found[found >= 0]] >= tenth - _TIE).sum())
    return hits / (len(sample) * count)


def _table(cosines: np.ndarray, neighbors: np.ndarray) -> pa.Table:
    n, count = neighbors.shape
    columns = {
        "feature": np.repeat(np.arange(n, dtype=np.int32), count),
        "rank": np.tile(np.arange(1, count + 1, dtype=np.int32), n),
        "neighbor": neighbors.astype(np.int32).ravel(),
        "cosine": cosines.ravel(),
    }
    return pa.table(columns).filter(pa.array(neighbors.ravel() >= 0))  # a graph may find fewer than asked
