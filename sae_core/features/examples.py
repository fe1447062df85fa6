"""Which firings are shown for a feature, and the text around them.

The strongest firings, and a random few from each activation level ((i - 1) / n, i / n] of the feature's maximum
(Templeton et al. 2024: top examples, and random ones in equal buckets from 0 to the maximum). Variety is asked for:
a context (one document in one block) and a window's text are shown once for a feature.

The choice is made in one pass over the shards with a bounded pool for each feature and group (a level, or the
strongest). A shard offers, for each group, the first firing of each context; the pool keeps the first of each window
and of those the first few. What comes first is the stronger value for the strongest, and a seeded hash of feature and
place for a level, so the choice does not hang on how the tokens lie in shards.
"""

import itertools
from collections.abc import Iterable

import numpy as np
from jaxtyping import Bool, Float, Float32, Float64, Int, Int64

from sae_core.corpus import Blocks
from sae_core.features.firings import Firings
from sae_core.features.runs import is_first, rank
from sae_core.study import FeatureSettings

CANDIDATE = np.dtype(
    [
        ("feature", np.int64), ("group", np.int64), ("order", np.float64), ("value", np.float32), ("block", np.int64),
        ("offset", np.int64), ("start", np.int64), ("stop", np.int64), ("context", np.int64), ("window", np.int64),
    ]
)  # fmt: skip
"""A firing that may be shown. `feature` counts from the first of the range; `group` is a level, or 0: the strongest."""

Candidates = np.ndarray


def bins(values: Float32[np.ndarray, " n"], maxima: Float32[np.ndarray, " n"], n_bins: int) -> Int64[np.ndarray, " n"]:
    """Which of `n_bins` equal bins of (0, maximum], closed above and counted from 0, each value lies in."""
    found = np.ceil(values.astype(np.float64) / maxima * n_bins).astype(np.int64) - 1
    return np.clip(found, 0, n_bins - 1)


class Pool:
    """The candidates of a range of features, kept bounded while shards are added."""

    def __init__(self, features: range, maxima: Float32[np.ndarray, " features"], settings: FeatureSettings) -> None:
        self._first = features.start
        self._maxima = maxima
        self._settings = settings
        self._kept = np.empty(0, CANDIDATE)
        # An example shown elsewhere can rule out two candidates of a level: one by its context, one by its window.
        others = settings.top_examples + (settings.levels - 1) * settings.level_examples
        level_size = settings.level_examples + 2 * others if settings.level_examples else 0
        self._sizes = np.array([settings.top_examples] + [level_size] * settings.levels)
        # What comes after the last candidate of a full group cannot get in.
        self._cutoff = np.where(self._sizes > 0, np.inf, -np.inf) * np.ones((len(maxima), 1))

    def add(self, firings: Firings) -> None:
        """Take in the firings of one shard."""
        level = bins(firings.value, self._maxima[firings.feature], self._settings.levels) + 1
        keys = draw(self._settings.seed, firings.feature + self._first, firings.block, firings.offset)
        strongest = self._offer(firings, np.zeros_like(level), -firings.value.astype(np.float64))
        merged = np.concatenate([self._kept, strongest, self._offer(firings, level, keys)])
        merged = merged[np.lexsort((merged["order"], merged["window"], self._slot(merged)))]
        merged = merged[is_first(self._slot(merged), merged["window"])]
        merged = merged[np.lexsort((merged["order"], self._slot(merged)))]
        place, size = rank(self._slot(merged)), self._sizes[merged["group"]]
        last = merged[place == size - 1]
        self._cutoff[last["feature"], last["group"]] = last["order"]
        self._kept = merged[place < size]

    def _offer(self, firings: Firings, group: Int64[np.ndarray, " n"], order: Float64[np.ndarray, " n"]) -> Candidates:
        """Of each feature, group and context of a shard, the firing that comes first, if it can still get in."""
        open_ = np.flatnonzero(order <= self._cutoff[firings.feature, group])
        feature, context, group, order = firings.feature[open_], firings.context[open_], group[open_], order[open_]
        by = np.lexsort((order, group, context, feature))
        by = by[is_first(feature[by], context[by], group[by])]
        found = np.empty(len(by), CANDIDATE)
        found["group"], found["order"] = group[by], order[by]
        for name in ("feature", "value", "block", "offset", "start", "stop", "context", "window"):
            found[name] = getattr(firings, name)[open_[by]]
        return found

    def _slot(self, candidates: Candidates) -> Int64[np.ndarray, " n"]:
        """One number for feature and group."""
        return candidates["feature"] * len(self._sizes) + candidates["group"]

    def choose(self) -> Candidates:
        """The examples, by feature, the strongest first."""
        ends = np.searchsorted(self._kept["feature"], np.arange(len(self._maxima) + 1))
        taken = [low + _choose(self._kept[low:high], self._settings) for low, high in itertools.pairwise(ends)]
        chosen = self._kept[np.concatenate(taken)]
        return chosen[np.lexsort((chosen["offset"], chosen["block"], -chosen["value"], chosen["feature"]))]


def _choose(pool: Candidates, settings: FeatureSettings) -> Int64[np.ndarray, " chosen"]:
    """Places in the pool of one feature's examples: the strongest first, then the levels from the highest down."""
    chosen: list[int] = []
    shown: set[tuple[str, int]] = set()
    ends = np.searchsorted(pool["group"], np.arange(settings.levels + 2)).tolist()
    contexts, windows = pool["context"].tolist(), pool["window"].tolist()
    for group in (0, *range(settings.levels, 0, -1)):
        wanted = len(chosen) + (settings.level_examples if group else settings.top_examples)
        for i in range(ends[group], ends[group + 1]):
            if len(chosen) == wanted:
                break
            traits = {("context", contexts[i]), ("window", windows[i])}
            if shown.isdisjoint(traits):
                shown |= traits
                chosen.append(i)
    return np.array(chosen, np.int64)


def acts_in_windows(chosen: Candidates, shards: Iterable[Firings], width: int) -> Float32[np.ndarray, "examples width"]:
    """The feature's value on each token of each example's window; 0 where it does not fire, and behind the window."""
    acts = np.zeros((len(chosen), width), np.float32)
    place = chosen["start"][:, None] + np.arange(width)
    inside = place < chosen["stop"][:, None]
    wanted = _address(chosen["feature"][:, None], chosen["block"][:, None], place)
    for firings in shards:
        there = _address(firings.feature, firings.block, firings.offset)  # ascending: see Firings
        at = np.minimum(np.searchsorted(there, wanted), len(there) - 1)
        acts = np.where(inside & (there[at] == wanted), firings.value[at], acts)
    return acts


def text_in_windows(
    chosen: Candidates, corpus: Blocks, width: int
) -> tuple[Int[np.ndarray, "examples width"], Bool[np.ndarray, "examples width"]]:
    """Token ids of each example's window, and which of them are inside it."""
    place = chosen["start"][:, None] + np.arange(width)
    inside = place < chosen["stop"][:, None]
    ids = np.asarray(corpus.token_ids[chosen["block"][:, None], np.where(inside, place, 0)])
    return ids, inside


def draw(seed: int, *parts: Int[np.ndarray, " n"]) -> Float[np.ndarray, " n"]:
    """Uniform numbers in [0, 1) that hang only on `seed` and the parts (SplitMix64 of Steele et al. 2014, chained)."""
    state = _mix(np.full(1, seed % 2**64, np.uint64))
    for part in parts:
        state = _mix(state ^ part.astype(np.uint64))
    return (state >> np.uint64(11)) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _address(feature: np.ndarray, block: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """One number for feature (below 2^16), block (below 2^31) and place in it (below 2^16), in that order."""
    return (feature.astype(np.int64) << 47) | (block.astype(np.int64) << 16) | offset
