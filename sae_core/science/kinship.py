"""Which features of two dictionaries are the same, and which of a larger one lie under one of a smaller."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_core.dictionary import Dictionary
from sae_core.science.firings import Firings

TWIN = 0.7
"""Cosine of decoder rows above which two features of two seeds are one (Paulo and Belrose 2025)."""
UNDER_COSINE, UNDER_MASKED = 0.6, 0.4
"""A feature lies under one of a smaller dictionary when decoder cosine and masked similarity both exceed these.

The latter is Bricken et al.'s (2023).
"""
BANDS = 3


def nearest(
    rows: Float[Tensor, "n d_model"], among: Float[Tensor, "m d_model"]
) -> tuple[Float[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """For each row the largest cosine with one of the others, and which; all are unit rows."""
    best = [(part @ among.T).max(1) for part in rows.split(1024)]
    return torch.cat([b.values for b in best]).numpy(), torch.cat([b.indices for b in best]).numpy()


class Universality(NamedTuple):
    """How many features of one seed are there in another."""

    shared: float
    """Share of the live features with a twin by decoder cosine."""
    low: float
    high: float
    """Of the share, at 95%, by resampled features."""
    shared_random: float
    """The same against random directions."""
    by_frequency: list[float]
    """The share among the rarest, middle and most frequent third."""
    correlation: float
    """Median over features of the largest correlation of activations (Bricken et al. 2023: 0.72)."""
    correlation_random: float
    """The same against random directions of the same density."""


def universality(
    one: Dictionary, other: Dictionary, random: Dictionary, firings: tuple[Firings, Firings, Firings]
) -> Universality:
    """Compare two seeds' dictionaries; `firings` are of the three, on one sample."""
    alive = firings[0].counts > 0
    is_twin = nearest(one.W_dec[torch.from_numpy(alive)], other.W_dec)[0] > TWIN
    order = np.argsort(firings[0].counts[alive], kind="stable")
    low, high = share_interval(is_twin)
    return Universality(
        float(is_twin.mean()), low, high,
        float((nearest(one.W_dec[torch.from_numpy(alive)], random.W_dec)[0] > TWIN).mean()),
        [float(is_twin[band].mean()) for band in np.array_split(order, BANDS)],
        *(float(np.median(firings[0].correlations(f)[alive].max(1))) for f in firings[1:]),
    )  # fmt: skip


def share_interval(found: Bool[np.ndarray, " n"], resamples: int = 1000) -> tuple[float, float]:
    """The share's interval at 95%, by resampling."""
    n = max(len(found), 1)
    drawn = np.random.default_rng(0).binomial(n, float(found.mean()) if len(found) else 0.0, resamples) / n
    return float(np.quantile(drawn, 0.025)), float(np.quantile(drawn, 0.975))


@dataclass(frozen=True)
class Kin:
    """The live features of a larger dictionary, each with the nearest of the smaller one."""

    smaller: int
    larger: int
    feature: Int[np.ndarray, " n"]
    """Of the larger."""
    parent: Int[np.ndarray, " n"]
    """The nearest of the smaller by decoder cosine."""
    cosine: Float[np.ndarray, " n"]
    masked: Float[np.ndarray, " n"]
    """Masked similarity of activations with it."""

    @property
    def under(self) -> Bool[np.ndarray, " n"]:
        """Whether it lies under it."""
        return (self.cosine > UNDER_COSINE) & (self.masked > UNDER_MASKED)

    @property
    def new(self) -> Bool[np.ndarray, " n"]:
        """Whether it lies under none by either measure."""
        return (self.cosine <= UNDER_COSINE) & (self.masked <= UNDER_MASKED)

    def rows(self) -> Iterator[dict[str, Any]]:
        """One for each feature of the larger, as JSON takes it."""
        columns = zip(self.feature, self.parent, self.cosine, self.masked, self.under, strict=True)
        for feature, parent, cosine, masked, under in columns:
            yield {
                "d_sae": self.larger, "feature": int(feature), "parent": int(parent) if under else None,
                "cosine": float(cosine), "masked": float(masked),
            }  # fmt: skip

    def children(self) -> dict[int, list[int]]:
        """The features under each of the smaller's that has any."""
        found: dict[int, list[int]] = {}
        for parent, feature in zip(self.parent[self.under], self.feature[self.under], strict=True):
            found.setdefault(int(parent), []).append(int(feature))
        return found


def kin(smaller: Dictionary, larger: Dictionary, firings: tuple[Firings, Firings]) -> Kin:
    """Where each live feature of the larger comes from; `firings` are of both, on one sample."""
    alive = np.flatnonzero(firings[1].counts)
    cosine, parent = nearest(larger.W_dec[torch.from_numpy(alive)], smaller.W_dec)
    masked = firings[1].masked_similarity(firings[0])[alive, parent]
    return Kin(smaller.d_sae, larger.d_sae, alive, parent, cosine, masked)


def tree(levels: Sequence[Kin], names: dict[int, list[str]], roots: int) -> list[str]:
    """The families with most descendants as indented lines: d_sae/feature and what it fires on.

    Args:
        levels: from the smallest pair of sizes on, each larger one the next one's smaller.
        names: for each d_sae, what each feature fires on.
        roots: families shown.
    """
    children = [level.children() for level in levels]

    def size(depth: int, feature: int) -> int:
        below = children[depth].get(feature, []) if depth < len(children) else []
        return len(below) + sum(size(depth + 1, child) for child in below)

    def lines(depth: int, d_sae: int, feature: int) -> list[str]:
        found = [f"{'  ' * depth}{d_sae}/{feature}: {names[d_sae][feature]}"]
        for child in children[depth].get(feature, []) if depth < len(children) else []:
            found += lines(depth + 1, levels[depth].larger, child)
        return found

    first = sorted(children[0], key=lambda feature: -size(0, feature))[:roots] if levels else []
    return [line for feature in first for line in lines(0, levels[0].smaller, feature)]
