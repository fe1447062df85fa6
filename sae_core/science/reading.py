"""How plainly the units of a basis can be read, with no model asked: single tokens, and names made of tokens.

A unit's name is the three tokens that it fires on most often in one half of the text, as the lexical labels of
`sae_core.labels` are; its score is how well they tell, token by token, where it fires in the other half: the balanced
accuracy, 0.5 for a name that says nothing. It sees words and no meaning, so that a unit of a topic scores low.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int

from sae_core.labels.prompts import as_data
from sae_core.science.firings import Firings, Sample, top_tokens

LEAST_FIRINGS = 20
"""A unit of fewer is not judged."""
NAMED = 3
"""Tokens of a name."""
DENSE = 0.01
"""Share of the tokens above which a unit is dense (Bricken et al. 2023)."""


class Reading(NamedTuple):
    """What can be told of the units of one basis."""

    name: str
    live: int
    """Units that fire at all."""
    dense: float
    """Share of them that fire on more than `DENSE` of the tokens."""
    single: Bool[np.ndarray, " n"]
    """Of those with `LEAST_FIRINGS`: whether the strongest are all of one token."""
    score: Float[np.ndarray, " n"]
    """Of these: the name's balanced accuracy; NaN where a half has no firings."""
    control: Float[np.ndarray, " n"]
    """The same of another unit's name."""

    @property
    def single_token(self) -> float:
        """Share of single-token units; 0 when there are none to judge."""
        return float(self.single.mean()) if len(self.single) else 0.0

    def scores(self, single: bool | None = None) -> Float[np.ndarray, " n"]:
        """The scores that there are: of all, of single-token units, or of the others."""
        kept = self.score if single is None else self.score[self.single == single]
        return kept[~np.isnan(kept)]


def read_units(name: str, firings: Firings, sample: Sample, strings: Sequence[str]) -> Reading:
    """Read all units of a basis; halves are of blocks, and `strings` is the text of each token id."""
    live = firings.counts > 0
    judged = np.flatnonzero(firings.counts >= LEAST_FIRINGS)
    variant = variants(strings)[sample.token]
    named, asked = sample.block % 2 == 0, sample.block % 2 == 1
    counts = np.bincount(variant[asked], minlength=1)
    names, single = [], []
    for unit in judged:
        rows = firings.of_feature(int(unit))[0]
        ids, often = np.unique(variant[rows[named[rows]]], return_counts=True)
        names.append(ids[np.argsort(-often, kind="stable")[:NAMED]])
        single.append(len(set(sample.token[firings.strongest(int(unit), LEAST_FIRINGS)].tolist())) == 1)
    fires = [variant[rows[asked[rows]]] for rows, _ in map(firings.of_feature, map(int, judged))]
    others = [*names[1:], *names[:1]]
    own, control = (
        np.array([_accuracy(one, words, counts) for one, words in zip(fires, told, strict=True)], float)
        for told in (names, others)
    )
    dense = float((firings.counts[live] > DENSE * len(sample.token)).mean()) if live.any() else 0.0
    return Reading(name, int(live.sum()), dense, np.array(single, bool), own, control)


def variants(strings: Sequence[str]) -> Int[np.ndarray, " vocab"]:
    """One number for all tokens that differ in case and spaces alone, as lexical labels take them for one."""
    seen: dict[str, int] = {}
    return np.array([seen.setdefault((text.strip() or text).casefold(), len(seen)) for text in strings])


def _accuracy(fires: Int[np.ndarray, " n"], words: Int[np.ndarray, " m"], counts: Int[np.ndarray, " _"]) -> float:
    """Mean of the shares of the tokens that fire, and of those that do not, on which the name is right."""
    hits, silent = int(np.isin(fires, words).sum()), int(counts.sum()) - len(fires)
    if not len(fires) or not len(words) or not silent:
        return float("nan")
    false = int(counts[words[words < len(counts)]].sum()) - hits
    return (hits / len(fires) + 1 - false / silent) / 2


def difference(
    one: Float[np.ndarray, " n"], other: Float[np.ndarray, " m"], resamples: int = 1000
) -> tuple[float, float, float]:
    """How much larger the mean of one is than the other's, and the interval at 95%, by resampling; NaN of nothing."""
    if not len(one) or not len(other):
        return float("nan"), float("nan"), float("nan")
    draw = np.random.default_rng(0)
    means = [np.array([draw.choice(x, len(x)).mean() for _ in range(resamples)]) for x in (one, other)]
    low, high = np.quantile(means[0] - means[1], [0.025, 0.975])
    return float(one.mean() - other.mean()), float(low), float(high)


def shown(firings: Firings, sample: Sample, strings: Any, count: int, seed: int = 0) -> Iterator[str]:
    """The tokens among the strongest of some units with enough firings, drawn at random."""
    judged = np.flatnonzero(firings.counts >= LEAST_FIRINGS)
    for unit in np.random.default_rng(seed).permutation(judged)[:count]:
        yield " ".join(map(as_data, top_tokens(firings, int(unit), sample, strings)[:4]))
