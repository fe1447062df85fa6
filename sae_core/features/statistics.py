"""How often and how strongly features fire, and on which tokens: exact counts over all shards."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Float64, Int64

from sae_core.features.examples import bins
from sae_core.features.firings import Firings
from sae_core.features.runs import rank
from sae_core.metrics import DENSE

HISTOGRAM_BINS = 20

Column = Int64[np.ndarray, " found"]


class Totals(NamedTuple):
    """Sums over all firings of a range of features."""

    n_fired: Int64[np.ndarray, " features"]
    sum: Float64[np.ndarray, " features"]
    maximum: Float32[np.ndarray, " features"]

    @property
    def mean(self) -> Float32[np.ndarray, " features"]:
        """Mean value over the firings; 0 where there are none."""
        return (self.sum / np.maximum(self.n_fired, 1)).astype(np.float32)


def totals(shards: Iterable[Firings], n_features: int) -> Totals:
    """Number, sum and maximum of each feature's firings."""
    n_fired = np.zeros(n_features, np.int64)
    total = np.zeros(n_features, np.float64)
    maximum = np.zeros(n_features, np.float32)
    for firings in shards:
        n_fired += np.bincount(firings.feature, minlength=n_features)
        total += np.bincount(firings.feature, firings.value, minlength=n_features)
        np.maximum.at(maximum, firings.feature, firings.value)
    return Totals(n_fired, total, maximum)


class Counts:
    """Histogram of a range of features' values, and the tokens they fire on, counted shard by shard."""

    def __init__(self, maxima: Float32[np.ndarray, " features"], vocab_size: int) -> None:
        self._maxima = maxima
        self.histogram = np.zeros((len(maxima), HISTOGRAM_BINS), np.int64)
        self._tokens = np.zeros((len(maxima), vocab_size), np.int32)

    def add(self, firings: Firings) -> None:
        """Count the firings of one shard."""
        bin_ = bins(firings.value, self._maxima[firings.feature], HISTOGRAM_BINS)
        np.add.at(self.histogram, (firings.feature, bin_), 1)
        np.add.at(self._tokens, (firings.feature, firings.token), 1)

    def top_tokens(self, n: int) -> tuple[Column, Column, Column]:
        """Feature, token id and count of the (at most) `n` commonest tokens of each feature, commonest first."""
        feature, token = np.nonzero(self._tokens)
        count = self._tokens[feature, token].astype(np.int64)
        by = np.lexsort((token, -count, feature))
        by = by[rank(feature[by]) < n]
        return feature[by], token[by], count[by]


def summarize(n_fired: Int64[np.ndarray, " d_sae"], tokens: int) -> dict[str, Any]:
    """The stage's summary: how many features live, and how densities spread."""
    density = n_fired / tokens
    alive = density[n_fired > 0]
    edges = np.arange(-8, 0.5, 0.5)
    counts, _ = np.histogram(np.log10(alive), edges)
    n_dead = len(n_fired) - len(alive)
    return {
        "n_features": len(n_fired),
        "n_alive": len(alive),
        "n_dead": n_dead,
        "dead": n_dead / len(n_fired),
        "n_dense": int((density > DENSE).sum()),
        "median_density": float(np.median(alive)) if len(alive) else 0.0,
        "tokens": tokens,
        "density_histogram": {"log10_edges": edges.tolist(), "features": counts.tolist()},
    }
