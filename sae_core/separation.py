"""How well a number tells two kinds of text apart: AUC, its interval, its chance, and an effect size.

AUC is the chance that a positive's number is above a negative's, ties counting half (Mann-Whitney U / (P * N)).
"""

import numpy as np
from jaxtyping import Float
from scipy import stats

BOOTSTRAPS = 1000
LEVEL = 0.95
"""Share of bootstrap samples inside an interval."""


def auc(
    positive: Float[np.ndarray, "p features"], negative: Float[np.ndarray, "n features"]
) -> Float[np.ndarray, " features"]:
    """AUC of each column."""
    p, n = len(positive), len(negative)
    ranks = stats.rankdata(np.concatenate([positive, negative]), axis=0)
    return (ranks[:p].sum(0) - p * (p + 1) / 2) / (p * n)


def p_values(
    positive: Float[np.ndarray, "p features"], negative: Float[np.ndarray, "n features"], tried: int
) -> Float[np.ndarray, " features"]:
    """Chance of each column's AUC, or a larger one, were there no difference; times `tried` (Bonferroni), at most 1.

    Mann-Whitney's test in its normal approximation with ties, one-sided.
    """
    with np.errstate(invalid="ignore", divide="ignore"):
        found = stats.mannwhitneyu(positive, negative, alternative="greater", axis=0, method="asymptotic").pvalue
    return np.minimum(np.nan_to_num(found, nan=1.0) * tried, 1.0)  # a constant column has no variance: no evidence


def effect_sizes(
    positive: Float[np.ndarray, "p features"], negative: Float[np.ndarray, "n features"]
) -> Float[np.ndarray, " features"]:
    """Cohen's d: difference of the means over the pooled standard deviation; 0 where nothing varies."""
    p, n = len(positive), len(negative)
    squares = [((side - side.mean(0)) ** 2).sum(0) for side in (positive, negative)]
    pooled = (squares[0] + squares[1]) / max(p + n - 2, 1)
    difference = positive.mean(0) - negative.mean(0)
    return np.divide(difference, np.sqrt(pooled), out=np.zeros_like(difference), where=pooled > 0)


def interval(
    positive: Float[np.ndarray, " p"], negative: Float[np.ndarray, " n"],
    groups: tuple[np.ndarray, np.ndarray] | None = None, seed: int = 0,
) -> tuple[float, float]:  # fmt: skip
    """Bootstrap interval of one AUC (percentiles of 1,000 samples; Efron 1979).

    Args:
        positive: numbers of the positives.
        negative: numbers of the negatives.
        groups: which group each belongs to (texts made from one template say nearly the same); whole groups are drawn.
        seed: of the drawing.
    """
    rng = np.random.default_rng(seed)
    above = (positive[:, None] > negative) + 0.5 * (positive[:, None] == negative)
    of_positive, of_negative = groups or (np.arange(len(positive)), np.arange(len(negative)))
    p, n = _weights(of_positive, rng), _weights(of_negative, rng)
    found = np.einsum("bp,pn,bn->b", p, above, n, optimize=True) / (p.sum(1) * n.sum(1))
    low, high = np.quantile(found, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _weights(group: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """How often each item is in each bootstrap sample, [samples, items]."""
    kinds, of = np.unique(group, return_inverse=True)
    return rng.multinomial(len(kinds), np.full(len(kinds), 1 / len(kinds)), BOOTSTRAPS)[:, of].astype(float)
