"""Scores as means over pairs of a text in which the feature fires and one in which it does not.

Balanced accuracy and the area under the ROC curve both are: of (hit_i + rejected_j) / 2, and of [s_i > s_j], a tie
counting half (Mann and Whitney 1947). So one bootstrap serves both: texts are drawn again with replacement, those that
fire and those that do not apart (Efron and Tibshirani 1993, ch. 13: the percentile interval).
"""

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

RESAMPLES = 2000
_TAILS = (2.5, 97.5)  # percentiles between which 95% lie

Pairs = Float[np.ndarray, "fires silent"]


class Interval(NamedTuple):
    """Where an estimate lies with 95%; NaN where there is nothing to estimate it from."""

    low: float
    high: float


def accuracy_pairs(says: Float[np.ndarray, " texts"], fires: Bool[np.ndarray, " texts"]) -> Pairs:
    """Pairs whose mean is the balanced accuracy of `says` (1: fires, 0: does not; NaN: no answer, left out)."""
    hit, rejected = says[fires], 1 - says[~fires]
    hit, rejected = hit[np.isfinite(hit)], rejected[np.isfinite(rejected)]
    return (hit[:, None] + rejected[None, :]) / 2


def auc_pairs(similarity: Float[np.ndarray, " texts"], fires: Bool[np.ndarray, " texts"]) -> Pairs:
    """Pairs whose mean is the area under the ROC curve."""
    difference = similarity[fires][:, None] - similarity[~fires][None, :]
    return (np.sign(difference) + 1.0) / 2


def bootstrap(pairs: Pairs, seed: int = 0) -> Interval:
    """Where the mean over all pairs lies.

    With no error among few texts the interval has no width: it says how many texts there were, not that there are none.
    """
    if not pairs.size:
        return Interval(math.nan, math.nan)
    rng = np.random.default_rng(seed)
    n, m = pairs.shape
    rows = rng.multinomial(n, np.full(n, 1 / n), RESAMPLES)
    columns = rng.multinomial(m, np.full(m, 1 / m), RESAMPLES)
    means = ((rows @ pairs) * columns).sum(1) / (n * m)
    low, high = np.percentile(means, _TAILS)
    return Interval(float(low), float(high))
