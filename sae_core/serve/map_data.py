"""What the map page draws: every feature's place, cluster, density and score in one binary table, and their names.

The table's rows lie along a Z-order curve (Morton 1966), so that features near each other on the map have their names
in the same few chunks. A browser reads whole columns without parsing; `tests/serve/test_map.py` states the layout.
"""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Float32, Float64, Int64

from sae_core.artifacts import ArtifactStore
from sae_core.features import Features
from sae_core.labels.reader import BEST_SCORE, LABELS, doubted
from sae_core.serve.cluster_names import cluster_names
from sae_core.settings import fingerprint

MAP = "map.parquet"

COLUMNS = {"feature": "<i4", "x": "<f4", "y": "<f4", "cluster": "<i4", "density": "<f4", "score": "<f4"}
"""Columns of the binary table, one after the other; a missing score is NaN, cluster -1 is none."""
CHUNK = 1024
"""Names in one chunk."""


@dataclass(frozen=True, slots=True)
class Cluster:
    """A group of features on the map."""

    cluster: int
    name: str
    """The tokens that tell it from the others."""
    x: float
    y: float
    """Median of its features' places."""
    size: int
    features: list[int]
    """A few of its features, those that fire most often first."""


class MapData:
    """The map of one dictionary. Raises ArtifactError when its map or its features are not made."""

    def __init__(self, store: ArtifactStore, dictionary: str) -> None:
        self.dictionary = dictionary
        made = store.get("feature_map", dictionary)
        table = pq.read_table(made.folder / MAP)
        self._features = Features.open(store.get("features", dictionary).folder)
        labels = store.get("labels", dictionary) if store.manifest("labels", dictionary) else None
        self._labels = pq.read_table(labels.folder / LABELS) if labels else None
        stages = (store.manifest(stage, dictionary) for stage in ("feature_map", "features", "labels"))
        self.version = fingerprint([manifest.fingerprint for manifest in stages if manifest])
        """Another one when any of what is drawn has changed: for addresses that may be kept forever."""
        self.columns = self._arrange(table)

    def __len__(self) -> int:
        return len(self.columns["feature"])

    def to_bytes(self) -> bytes:
        """The columns in the order of `COLUMNS`, little-endian, one after the other."""
        return b"".join(self.columns[name].astype(kind).tobytes() for name, kind in COLUMNS.items())

    def summary(self) -> dict[str, Any]:
        """What a browser must know to read the table: its length, its columns, and the clusters, the largest first."""
        clusters = [{"id": c.cluster, "name": c.name, "x": c.x, "y": c.y, "size": c.size} for c in self.clusters]
        return {"n": len(self), "columns": list(COLUMNS), "chunk": CHUNK, "has_score": self.has_score,
                "version": self.version, "clusters": clusters}  # fmt: skip

    @property
    def has_score(self) -> bool:
        return bool(np.isfinite(self.columns["score"]).any())

    @property
    def n_chunks(self) -> int:
        return -(-len(self) // CHUNK)

    def names(self, chunk: int) -> list[str]:
        """Names of the features of a chunk of the table's rows. Raises IndexError when there is no such chunk."""
        if not 0 <= chunk < self.n_chunks:
            raise IndexError(f"there are {self.n_chunks} chunks")
        if self._names is None:
            return [""] * len(self.columns["feature"][chunk * CHUNK : (chunk + 1) * CHUNK])
        return self._names.take(pa.array(self.columns["feature"][chunk * CHUNK : (chunk + 1) * CHUNK])).to_pylist()

    def name(self, feature: int) -> str:
        """What the feature is called; empty before labels are made."""
        return self._names[feature].as_py() if self._names is not None else ""

    @cached_property
    def clusters(self) -> list[Cluster]:
        """All clusters, the largest first."""
        numbers = self.columns["cluster"]
        order = np.lexsort((-self.columns["density"], numbers))
        ids, start = np.unique(numbers[order], return_index=True)
        names = self._cluster_names()
        found = []
        for cluster, members in zip(ids.tolist(), np.split(order, start[1:]), strict=True):
            if cluster >= 0:
                x, y = (float(np.median(self.columns[axis][members])) for axis in "xy")
                few = self.columns["feature"][members[:6]].tolist()
                found.append(Cluster(cluster, names.get(cluster, ""), x, y, len(members), few))
        return sorted(found, key=lambda c: -c.size)

    def _cluster_names(self) -> dict[int, str]:
        cluster = np.full(len(self._features), -1)
        cluster[self.columns["feature"]] = self.columns["cluster"]
        return cluster_names(self._features.columns("top_tokens", "top_token_shares"), cluster)

    def _arrange(self, table: pa.Table) -> dict[str, np.ndarray]:
        """The columns of all features that have a place, along the curve."""
        place = {name: table[name].to_numpy() for name in ("feature", "x", "y", "cluster")}
        rows = np.flatnonzero(np.isfinite(place["x"]) & np.isfinite(place["y"]))
        rows = rows[np.argsort(z_order(place["x"][rows], place["y"][rows]), kind="stable")]
        columns = {name: column[rows] for name, column in place.items()}
        feature = columns["feature"]
        columns["density"] = self._features.columns("density")["density"].to_numpy()[feature].astype(np.float32)
        columns["score"] = self._scores()[feature].astype(np.float32)
        return columns

    def _scores(self) -> Float64[np.ndarray, " d_sae"]:
        """How far to believe each label; NaN where it has no score."""
        if self._labels is None or "scores" not in self._labels.column_names:
            return np.full(len(self._features), np.nan)
        database = duckdb.connect()
        database.register("labels", self._labels)
        found = database.execute(
            f"SELECT CAST({BEST_SCORE} AS DOUBLE) AS score FROM labels ORDER BY feature"
        ).fetchnumpy()
        return np.ma.filled(found["score"], np.nan)

    @cached_property
    def _names(self) -> pa.Array | None:
        """What each feature is called, by its number, as text shows it; None before labels are made."""
        if self._labels is None:
            return None
        label, lexical = (self._labels[name].combine_chunks() for name in ("label", "lexical"))
        name = pc.coalesce(pc.if_else(pc.equal(label, ""), None, label), lexical, "")
        if "beats_control" not in self._labels.column_names:
            return name
        is_worse = pc.fill_null(pc.invert(self._labels["beats_control"].combine_chunks()), False)
        return pc.if_else(is_worse, pc.binary_join_element_wise(name, doubted("", False), ""), name)


def z_order(x: Float32[np.ndarray, " n"], y: Float32[np.ndarray, " n"]) -> Int64[np.ndarray, " n"]:
    """Each point's place along a Z-order curve over the points' bounds, 16 bits an axis."""
    code = np.zeros(len(x), np.int64)
    for shift, axis in enumerate((x, y)):
        span = float(np.ptp(axis)) if len(axis) else 0.0
        steps = ((axis - axis.min()) / span * 0xFFFF).astype(np.int64) if span else np.zeros(len(axis), np.int64)
        for bit in range(16):
            code |= ((steps >> bit) & 1) << (2 * bit + shift)
    return code
