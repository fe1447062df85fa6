"""What the map page draws: every feature's place, cluster, density and score in one binary table, and their names.

The table's rows lie along a Z-order curve (Morton 1966), so that features near each other on the map have their names
in the same few chunks. A browser reads whole columns without parsing; `test_map.py` states the layout.
"""

import json
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Float32, Float64, Int64
from safetensors import safe_open
from safetensors.numpy import save_file

from sae_core.artifacts import ArtifactError, ArtifactStore, write_atomically
from sae_core.features import Features
from sae_core.labels.reader import BEST_SCORE, LABELS, doubted
from sae_core.serve.cluster_names import cluster_names
from sae_core.serve.shapes import MapCluster, MapSummary
from sae_core.settings import fingerprint

MAP = "map.parquet"
VERSION = 1
"""Of what is kept; another one where it is gathered otherwise."""

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
        self._map = store.get("feature_map", dictionary).folder / MAP
        self._features = Features.open(store.get("features", dictionary).folder)
        labels = store.get("labels", dictionary) if store.manifest("labels", dictionary) else None
        self._labels = labels.folder / LABELS if labels else None
        stages = (store.manifest(stage, dictionary) for stage in ("feature_map", "features", "labels"))
        self.version = fingerprint([[manifest.fingerprint, manifest.made_at] for manifest in stages if manifest])
        """Another one when any of what is drawn has changed: for addresses that may be kept forever."""
        self.columns, self.clusters = self._gathered(store.root / "search" / dictionary)

    def __len__(self) -> int:
        return len(self.columns["feature"])

    def to_bytes(self) -> bytes:
        """The columns in the order of `COLUMNS`, little-endian, one after the other."""
        return b"".join(self.columns[name].astype(kind).tobytes() for name, kind in COLUMNS.items())

    def summary(self) -> MapSummary:
        """What a browser must know to read the table."""
        clusters = [MapCluster(id=c.cluster, name=c.name, x=c.x, y=c.y, size=c.size) for c in self.clusters]
        return MapSummary(
            n=len(self), columns=list(COLUMNS), chunk=CHUNK, has_score=self.has_score, version=self.version,
            clusters=clusters,
        )  # fmt: skip

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

    def _gathered(self, home: Path) -> tuple[dict[str, np.ndarray], list[Cluster]]:
        """The columns and the clusters, the largest first: kept from the first time on, where there is place for it."""
        kept = home / f"map-{VERSION}-{self.version}.safetensors"
        if kept.is_file():
            with safe_open(kept, framework="np") as file:
                told = json.loads(file.metadata()["clusters"])
                return {name: file.get_tensor(name) for name in COLUMNS}, [Cluster(**cluster) for cluster in told]
        columns = self._arrange(pq.read_table(self._map))
        clusters = self._clusters(columns)
        with suppress(OSError, ArtifactError):  # a store that cannot be written to is read all the same
            home.mkdir(parents=True, exist_ok=True)
            with write_atomically(kept) as path:
                save_file(columns, path, {"clusters": json.dumps([asdict(cluster) for cluster in clusters])})
            for old in home.glob("map-*.safetensors"):
                if old != kept:
                    old.unlink(missing_ok=True)
        return columns, clusters

    def _clusters(self, columns: dict[str, np.ndarray]) -> list[Cluster]:
        numbers = columns["cluster"]
        order = np.lexsort((-columns["density"], numbers))
        ids, start = np.unique(numbers[order], return_index=True)
        cluster_of = np.full(len(self._features), -1)
        cluster_of[columns["feature"]] = numbers
        names = cluster_names(self._features.columns("top_tokens", "top_token_shares"), cluster_of)
        found = []
        for cluster, members in zip(ids.tolist(), np.split(order, start[1:]), strict=True):
            if cluster >= 0:
                x, y = (float(np.median(columns[axis][members])) for axis in "xy")
                few = columns["feature"][members[:6]].tolist()
                found.append(Cluster(cluster, names.get(cluster, ""), x, y, len(members), few))
        return sorted(found, key=lambda c: -c.size)

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
        if self._labels is None or "scores" not in pq.read_schema(self._labels).names:
            return np.full(len(self._features), np.nan)
        database = duckdb.connect()
        database.register("labels", pq.read_table(self._labels, columns=["feature", "scores"]))
        found = database.execute(
            f"SELECT CAST({BEST_SCORE} AS DOUBLE) AS score FROM labels ORDER BY feature"
        ).fetchnumpy()
        return np.ma.filled(found["score"], np.nan)

    @cached_property
    def _names(self) -> pa.Array | None:
        """What each feature is called, by its number, as text shows it; None before labels are made."""
        if self._labels is None:
            return None
        wanted = ["label", "lexical", *({"beats_control"} & set(pq.read_schema(self._labels).names))]
        table = pq.read_table(self._labels, columns=wanted)
        label, lexical = (table[name].combine_chunks() for name in ("label", "lexical"))
        name = pc.coalesce(pc.if_else(pc.equal(label, ""), None, label), lexical, "")
        if "beats_control" not in wanted:
            return name
        is_worse = pc.fill_null(pc.invert(table["beats_control"].combine_chunks()), False)
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
