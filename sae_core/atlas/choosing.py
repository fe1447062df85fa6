"""How features that were found are filtered and sorted: by columns that are in memory, of all features at once."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Bool, Float32, Float64, Int64, Num

from sae_core.atlas.tables import Tables
from sae_core.errors import MindAtlasError
from sae_core.labels.reader import BEST_SCORE


class SearchError(MindAtlasError):
    """A search that cannot be made."""


class Found(NamedTuple):
    """Features that something was found of."""

    features: Int64[np.ndarray, " n"]
    """Ascending."""
    total: Float64[np.ndarray, " d_sae"]
    """The relevance of every feature; 0 of those that were not found."""
    why: Callable[[int], str] = lambda feature: ""
    """Where a found feature was found."""
    meaning: Mapping[int, float] = {}
    """Cosine of what was asked with the names of those that were found by it."""


class Filters(NamedTuple):
    """Which features a search may find."""

    min_density: float = 0.0
    max_density: float = 1.0
    min_score: float | None = None
    """Of the label, see `labels.reader.BEST_SCORE`."""
    kind: str = ""
    """The label's: `input`, `output`, `both`, `unclear`."""
    cluster: int | None = None
    """On the map; -1 is none."""
    written: bool = False
    """Leave out features without a written label."""
    alive: bool = False
    """Leave out features that never fire."""


ALL = Filters()

SORTS = {
    "relevance": ("total", -1),
    "density": ("density", -1),
    "rarity": ("density", 1),
    "strength": ("max_act", -1),
    "score": ("label_score", -1),
    "output": ("output_score", -1),
    "number": ("feature", 1),
}
"""How found features may be sorted: by what, from the least (1) or the largest (-1) on; unknown values come last."""


class Columns(NamedTuple):
    """What is filtered and sorted by, of every feature."""

    density: Float64[np.ndarray, " d_sae"]
    max_act: Float32[np.ndarray, " d_sae"]
    n_fired: Int64[np.ndarray, " d_sae"]
    label_score: Float64[np.ndarray, " d_sae"]
    """NaN where there is none."""
    output_score: Float32[np.ndarray, " d_sae"]
    """How well it steers; NaN where that was not measured."""
    cluster: Int64[np.ndarray, " d_sae"]
    """`NOWHERE` where it has no place on the map."""
    kind: pa.Array
    is_written: Bool[np.ndarray, " d_sae"]
    beats_control: pa.Array


NOWHERE = -2
"""Cluster of a feature without a place on the map; -1 is that of one beside all clusters."""


def has_scores(tables: Tables) -> bool:
    """Whether some label was scored."""
    asked = "SELECT count(*) FROM labels WHERE len(scores) > 0"
    return "scores" in tables.columns("labels") and bool(tables.query(asked)[0][0])


def read_columns(tables: Tables) -> Columns:
    """The columns of all features; what a stage that is not made yet would tell is unknown."""
    has = tables.columns("labels")
    columns = {
        "label_score": f"CAST({BEST_SCORE} AS DOUBLE)" if has_scores(tables) else "NULL::DOUBLE",
        "kind": "kind" if "kind" in has else "''",
        "is_written": "coalesce(label, '') <> ''" if has else "false",
        "beats_control": "beats_control" if "beats_control" in has else "NULL::BOOLEAN",
    }
    table = "labels" if has else "features"
    asked = ", ".join(f"{sql} AS {name}" for name, sql in columns.items())
    told = tables.arrow(f"SELECT {asked} FROM {table} ORDER BY feature")
    facts = tables.arrow("SELECT density, max_act, n_fired FROM features ORDER BY feature")
    cluster = np.full(len(facts), NOWHERE)
    if "map" in tables:
        places = tables.arrow("SELECT feature, cluster FROM map")
        cluster[places["feature"].to_numpy()] = places["cluster"].to_numpy()
    output_score = np.full(len(facts), np.nan, np.float32)
    if "steering" in tables:
        scored = tables.arrow("SELECT feature, output_score FROM steering WHERE output_score IS NOT NULL")
        output_score[scored["feature"].to_numpy()] = scored["output_score"].to_numpy()
    return Columns(
        **{name: facts[name].to_numpy() for name in ("density", "max_act", "n_fired")},
        label_score=told["label_score"].to_numpy(zero_copy_only=False),
        output_score=output_score,
        cluster=cluster,
        kind=told["kind"],
        is_written=told["is_written"].to_numpy(zero_copy_only=False),
        beats_control=told["beats_control"],
    )


def chosen(found: Found, columns: Columns, filters: Filters, sort: str, limit: int, offset: int) -> list[int]:
    """Those found features that pass the filters, in order, `limit` of them from the `offset`th on.

    Raises SearchError when there is no such order.
    """
    if sort not in SORTS:
        raise SearchError(f"{sort!r} is no order: choose one of {', '.join(SORTS)}")
    of, direction = SORTS[sort]
    features = found.features[_passing(columns, filters)[found.features]]
    keys = {"total": found.total, "feature": np.arange(len(found.total))}.get(of)
    keys = direction * (getattr(columns, of) if keys is None else keys)[features]
    return features[least(keys, offset + limit)[offset:]].tolist()


def _passing(columns: Columns, filters: Filters) -> Bool[np.ndarray, " d_sae"]:
    """Which features pass the filters."""
    passing = (columns.density >= filters.min_density) & (columns.density <= filters.max_density)
    if filters.min_score is not None:
        passing &= columns.label_score >= filters.min_score
    if filters.kind:
        passing &= pc.fill_null(pc.equal(columns.kind, filters.kind), False).to_numpy(zero_copy_only=False)
    if filters.cluster is not None:
        passing &= columns.cluster == filters.cluster
    if filters.written:
        passing &= columns.is_written
    if filters.alive:
        passing &= columns.n_fired > 0
    return passing


def least(keys: Num[np.ndarray, " n"], count: int) -> Int64[np.ndarray, " count"]:
    """Places of the `count` least keys in order, of equal ones the first; NaN comes last."""
    keys = np.where(np.isnan(keys), np.inf, keys)
    if count < len(keys):
        bound = np.partition(keys, count)[count]
        less, same = np.flatnonzero(keys < bound), np.flatnonzero(keys == bound)
        some = np.concatenate([less, same[: max(count - len(less), 0)]])
        return some[np.argsort(keys[some], kind="stable")]
    return np.argsort(keys, kind="stable")
