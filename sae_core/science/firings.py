"""Which features fire on which tokens of a sample, for several dictionaries and bases over the same tokens."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.sparse import csc_matrix
from torch import Tensor
from torch.nn.functional import normalize

from sae_core.activations import Activations
from sae_core.dictionary import Dictionary

CALIBRATED_ON = 16_384
"""Activations that the threshold of a basis is set on."""


class Sample(NamedTuple):
    """Tokens of the training text, in shuffled order, sinks left out."""

    acts: Float[Tensor, "tokens d_model"]
    block: Int[np.ndarray, " tokens"]
    offset: Int[np.ndarray, " tokens"]
    token: Int[np.ndarray, " tokens"]

    @classmethod
    def of(cls, folder: Path, tokens: int) -> "Sample":
        """The first so many tokens of a site's activations, or all; in memory, in the stored type."""
        parts: list[tuple[Tensor, ...]] = []
        for shard in Activations.open(folder).shards():
            keep = ~shard.is_sink
            parts.append((shard.acts[keep], shard.block[keep], shard.offset[keep], shard.token[keep]))
            if sum(len(part[0]) for part in parts) >= tokens:
                break
        acts, *places = (torch.cat(column)[:tokens] for column in zip(*parts, strict=True))
        return cls(acts, *(place.numpy() for place in places))


@dataclass(frozen=True)
class Firings:
    """Feature activations on a sample: [tokens, d_sae], zero where a feature does not fire."""

    values: csc_matrix

    @classmethod
    def of(cls, dictionary: Dictionary, sample: Sample) -> "Firings":
        """Of every token; holds what fires, and no dense array."""
        rows, features, values, start = [], [], [], 0
        for x in sample.acts.split(2048):
            acts = dictionary.encode_sparse(x)
            rows.append(acts.row + start)
            features.append(acts.feature)
            values.append(acts.value)
            start += len(x)
        places = torch.cat(rows).numpy(), torch.cat(features).numpy()
        return cls(csc_matrix((torch.cat(values).numpy(), places), (start, dictionary.d_sae)))

    @property
    def counts(self) -> Int[np.ndarray, " d_sae"]:
        """Tokens that each feature fires on."""
        return np.diff(self.values.indptr)

    def strongest(self, feature: int, n: int) -> Int[np.ndarray, " n_or_fewer"]:
        """The tokens that a feature fires on most, strongest first."""
        rows, values = self.of_feature(feature)
        return rows[np.argsort(-values, kind="stable")[:n]]

    def of_feature(self, feature: int) -> tuple[Int[np.ndarray, " n"], Float[np.ndarray, " n"]]:
        """The tokens that a feature fires on, and how strongly."""
        here = slice(self.values.indptr[feature], self.values.indptr[feature + 1])
        return self.values.indices[here], self.values.data[here]

    def correlations(self, other: "Firings") -> Float[np.ndarray, "d_sae d_sae_other"]:
        """Pearson correlation of each feature with each of the other's over the tokens; 0 with what never fires."""
        n = self.values.shape[0]
        a, b = self.values.astype(np.float64), other.values.astype(np.float64)
        mean_a, mean_b = (np.asarray(m.mean(0)).ravel() for m in (a, b))
        covariance = (a.T @ b).toarray() / n - np.outer(mean_a, mean_b)
        std_a, std_b = (
            np.sqrt(np.asarray(m.multiply(m).mean(0)).ravel() - mean**2) for m, mean in ((a, mean_a), (b, mean_b))
        )
        scale = np.outer(std_a, std_b)
        return np.divide(covariance, scale, out=np.zeros_like(covariance), where=scale > 0)

    def masked_similarity(self, other: "Firings") -> Float[np.ndarray, "d_sae d_sae_other"]:
        """Cosine of each feature with each of the other's over the tokens on which the first one fires.

        After Bricken et al. 2023, who draw an edge between dictionaries where it is above 0.4.
        """
        a, b = self.values.astype(np.float64), other.values.astype(np.float64)
        own = np.sqrt(np.asarray(a.multiply(a).sum(0)).ravel())
        others = np.sqrt(((a > 0).astype(np.float64).T @ b.multiply(b)).toarray())
        scale = own[:, None] * others
        return np.divide((a.T @ b).toarray(), scale, out=np.zeros_like(scale), where=scale > 0)


def random_directions(like: Dictionary, sample: Sample, seed: int = 0) -> Dictionary:
    """As many random unit directions, read where they exceed the threshold at which as many fire on a token."""
    rows = torch.randn(like.d_sae, like.d_model, generator=torch.Generator().manual_seed(seed))
    return _basis(rows, like.config["k"], sample)


def principal_directions(like: Dictionary, sample: Sample) -> Dictionary:
    """The principal components of the sample, each in both directions, likewise."""
    x = sample.acts[:CALIBRATED_ON].float()
    rows = torch.linalg.eigh(torch.cov((x - x.mean(0)).T)).eigenvectors.T
    return _basis(torch.cat([rows, -rows]), like.config["k"], sample)


def _basis(rows: Float[Tensor, "n d_model"], k: int, sample: Sample) -> Dictionary:
    """Directions as a dictionary: projections, in standard deviations of each, above one threshold for all."""
    x = sample.acts[:CALIBRATED_ON].float()
    rows, mean = normalize(rows, dim=1), x.mean(0)
    W_enc = rows.T / ((x - mean) @ rows.T).std(0)
    z = torch.cat([part @ W_enc for part in (x - mean).split(2048)])
    threshold = torch.topk(z.flatten(), k * len(x)).values[-1].clamp(min=0)
    config = {"architecture": "batch_top_k", "k": k}
    return Dictionary(W_enc.contiguous(), -mean @ W_enc, rows, mean, threshold.expand(len(rows)).clone(), config)


def top_tokens(firings: Firings, feature: int, sample: Sample, strings: Any, n: int = 20) -> list[str]:
    """The tokens among a feature's `n` strongest, the most frequent first."""
    ids, counts = np.unique(sample.token[firings.strongest(feature, n)], return_counts=True)
    return [strings[ids[i]] for i in np.argsort(-counts, kind="stable")]


def single_token(firings: Firings, sample: Sample, n: int = 20) -> Iterator[bool]:
    """For each feature with `n` firings, whether all its strongest are the same token (Bricken et al. 2023)."""
    for feature in np.flatnonzero(firings.counts >= n):
        yield len(set(sample.token[firings.strongest(int(feature), n)].tolist())) == 1
