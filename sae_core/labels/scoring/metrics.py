"""Scores as means over pairs of a text in which the feature fires and one in which it does not.

The area under the ROC curve is one, of [s_i > s_j], a tie counting half (Mann and Whitney 1947); where the answers are
yes and no it is the balanced accuracy. So one bootstrap serves both: texts are drawn again with replacement, those that
fire and those that do not apart (Efron and Tibshirani 1993, ch. 13: the percentile interval).
"""

import math
from collections.abc import Callable
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


def auc_pairs(says: Float[np.ndarray, " texts"], fires: Bool[np.ndarray, " texts"]) -> Pairs:
    """Pairs whose mean is the area under the ROC curve; of answers 1 (fires) and 0, that is their balanced accuracy.

    NaN is no answer, and left out.
    """
    known = np.isfinite(says)
    difference = says[known & fires][:, None] - says[known & ~fires][None, :]
    return (np.sign(difference) + 1.0) / 2


def rating_pairs(ratings: Float[np.ndarray, " texts"], fires: Bool[np.ndarray, " texts"]) -> Pairs:
    """Pairs whose mean is the mean rating of the texts that fire (NaN: no answer, left out); no others."""
    rated = ratings[fires]
    return rated[np.isfinite(rated)][:, None]


class Pairwise:
    """A score that is a mean over pairs.

    Args:
        pairs: one of the functions above.
        fires: of each text whether the feature fires in it.
    """

    def __init__(
        self, pairs: Callable[[np.ndarray, np.ndarray], Pairs], fires: Bool[np.ndarray, " texts"]
    ) -> None:  # fmt: skip
        self._pairs, self._fires = pairs, fires

    def mean(self, says: Float[np.ndarray, " texts"], kept: Bool[np.ndarray, " texts"]) -> float | None:
        """The score on the texts that are kept; None where there are none to make it from."""
        pairs = self._pairs(says[kept], self._fires[kept])
        return float(pairs.mean()) if pairs.size else None

    def interval(self, says: Float[np.ndarray, " texts"], less: Float[np.ndarray, " texts"] | None = None) -> Interval:
        """Of the score; or of how much it is above that of `less`, on the texts that were answered under both names."""
        if less is None:
            return bootstrap(self._pairs(says, self._fires))
        both = np.isfinite(says) & np.isfinite(less)
        fires = self._fires[both]
        return bootstrap(self._pairs(says[both], fires) - self._pairs(less[both], fires))


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
    return between(((rows @ pairs) * columns).sum(1) / (n * m))


def between(draws: Float[np.ndarray, " draws"]) -> Interval:
    """The percentile interval of what a bootstrap drew."""
    low, high = np.percentile(draws, _TAILS)
    return Interval(float(low), float(high))
