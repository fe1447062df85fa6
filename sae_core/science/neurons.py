"""MLP neurons as the baseline that features are held against: how they fire, and which feature is one of them.

A neuron's activation is what goes into the last matrix of its MLP. One pass of the model over the tokens; kept are
sums, and what fires of one layer.
"""

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.sparse import csr_matrix, hstack
from torch import Tensor

from sae_core.corpus.packing import Blocks, kept_apart
from sae_core.language_model import LanguageModel
from sae_core.names import Hook
from sae_core.progress import Report, silent
from sae_core.science.firings import CALIBRATED_ON, Firings, Sample, basis
from sae_core.study import ActivationSettings

BATCH_TOKENS = 2048
"""Tokens of a forward pass, whose neurons are held for all layers."""
UNALIKE = 0.3
"""Correlation up to which a feature is no neuron (Templeton et al. 2024)."""

Part = tuple[Int[np.ndarray, " n"], list[Float[Tensor, "n d_mlp"]]]
"""Tokens, by number, and the neurons of each layer on them."""


class Alike(NamedTuple):
    """For each of some features the largest correlation, in absolute value, with one of many coordinates."""

    neuron: Float[np.ndarray, " n"]
    """With a neuron of any layer up to the site: a gated neuron's sign means nothing."""
    coordinate: Float[np.ndarray, " n"]
    """With a coordinate of the activation itself."""


class Neurons(NamedTuple):
    """The neurons of the layers up to a site, held against a dictionary's features."""

    layers: int
    number: int
    """Of all these layers."""
    features: Alike
    random: Alike
    """Random directions, in place of the features."""
    shuffled: Alike
    """The features on other tokens: what chance gives."""
    firings: Firings
    """Of the neurons of the last layer, each in both directions, at the threshold at which as many fire as features."""


class CorrelationSums:
    """Sums from which Pearson correlations with arrays that come part by part are made; memory does not grow with
    tokens.

    Args:
        x: what the arrays' columns are correlated with.
    """

    def __init__(self, x: csr_matrix) -> None:
        self.x = x.astype(np.float32)
        self._sums: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
        self._seen: list[Int[np.ndarray, " n"]] = []

    def add(self, rows: Int[np.ndarray, " n"], arrays: Sequence[Float[Tensor, "n _"]]) -> None:
        """Take up the arrays' values on some of the rows."""
        x, parts = self.x[rows], []
        for y in (array.float().numpy() for array in arrays):
            parts.append((x.T @ y, y.sum(0, dtype=np.float64), np.square(y, dtype=np.float64).sum(0)))
        if not self._sums:
            self._sums = [(np.zeros_like(xy), np.zeros_like(y), np.zeros_like(yy)) for xy, y, yy in parts]
        for sums, part in zip(self._sums, parts, strict=True):
            for total, more in zip(sums, part, strict=True):
                total += more
        self._seen.append(rows)

    def largest(self) -> list[Float[np.ndarray, " columns"]]:
        """For each array the largest correlation, in absolute value, of each column of x with one of its columns; 0 of
        what does not vary."""
        seen = self.x[np.concatenate(self._seen)].astype(np.float64)
        n, mean = seen.shape[0], np.asarray(seen.mean(0)).ravel()
        std = np.sqrt(np.asarray(seen.multiply(seen).mean(0)).ravel() - mean**2)
        found = []
        for xy, y, yy in self._sums:
            std_y = np.sqrt(np.maximum(yy / n - (y / n) ** 2, 0))
            scale = np.outer(std, std_y)
            covariance = np.abs(xy / n - np.outer(mean, y / n))
            found.append(np.divide(covariance, scale, out=np.zeros_like(scale), where=scale > 0).max(1))
        return found


def neurons(
    lm: LanguageModel, site: ActivationSettings, sample: Sample, blocks: Blocks, features: Firings, random: Firings,
    k: int, most: int, seed: int = 0, report: Report = silent,
) -> Neurons:  # fmt: skip
    """Hold features against all neurons that come before a site.

    Args:
        lm: the model.
        site: where the activations were read.
        sample: tokens, with their activations at the site.
        blocks: the text they are of.
        features: on the sample.
        random: random directions, on the sample.
        k: neurons of the last layer that are to fire on a token.
        most: features that are correlated, drawn at random of those that fire, and as many directions.
        seed: of the drawing.
        report: progress, in tokens.

    Raises ModelError when an MLP has no neurons of its own.
    """
    draw = np.random.default_rng(seed)
    live = [np.flatnonzero(one.counts) for one in (features, random)]
    chosen = [draw.permutation(one)[:most] for one in live]
    x = [one.values[:, columns].tocsr() for one, columns in zip((features, random), chosen, strict=True)]
    sums = CorrelationSums(hstack([*x, x[0][draw.permutation(len(sample.token))]], "csr"))

    def parts() -> Iterator[tuple[Int[np.ndarray, " n"], Float[Tensor, "n d_mlp"]]]:
        done = 0
        for rows, found in neuron_acts(lm, site, sample, blocks, layers_before(site), seed):
            sums.add(rows, [*found, sample.acts[torch.from_numpy(rows)]])
            report(done := done + len(rows), len(sample.token), "tokens")
            yield rows, found[-1]

    coming, held = parts(), list[tuple[np.ndarray, Tensor]]()
    while sum(len(rows) for rows, _ in held) < min(CALIBRATED_ON, len(sample.token)):
        held.append(next(coming))
    width = held[0][1].shape[1]
    both = torch.cat([torch.eye(width), -torch.eye(width)])
    directions = basis(both, k, torch.cat([acts for _, acts in held]))
    firings = Firings.of_parts(directions, chain(held, coming), len(sample.token))
    *by_layer, coordinate = sums.largest()
    ends = np.cumsum([len(one) for one in chosen])
    by_group = zip(np.split(np.max(by_layer, axis=0), ends), np.split(coordinate, ends), strict=True)
    alike, by_chance, shuffled = (Alike(*one) for one in by_group)
    return Neurons(len(by_layer), len(by_layer) * width, alike, by_chance, shuffled, firings)


def layers_before(site: ActivationSettings) -> list[int]:
    """The layers whose neurons are computed before a site, or are what it adds to; those of its own layer for what
    comes before the first MLP."""
    own: tuple[Hook, ...] = ("mlp_out", "resid_post")
    return [*range(site.layer + (site.hook in own))] or [0]


def neuron_acts(
    lm: LanguageModel, site: ActivationSettings, sample: Sample, blocks: Blocks, layers: Sequence[int], seed: int
) -> Iterator[Part]:
    """Neurons on a sample's tokens, a few of its blocks at a time, in random order."""
    order = np.random.default_rng(seed).permutation(np.unique(sample.block))
    for some in np.array_split(order, -(-len(order) * blocks.token_ids.shape[1] // BATCH_TOKENS)):
        some = np.sort(some)
        token_ids, documents = (torch.from_numpy(column[some]) for column in (blocks.token_ids, blocks.documents))
        found = lm.capture_neurons(layers, token_ids, kept_apart(documents, site.packing))
        rows = np.flatnonzero(np.isin(sample.block, some))
        at = np.searchsorted(some, sample.block[rows]), sample.offset[rows]
        yield rows, [acts[at].cpu() for acts in found]
