"""Which features fire on which tokens of a sample, for several dictionaries and bases over the same tokens."""

from collections.abc import Iterable
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
_ROWS = 2048


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

    def at(self, rows: Int[np.ndarray, " n"]) -> "Sample":
        """Some of the tokens."""
        return Sample(self.acts[torch.from_numpy(rows)], *(place[rows] for place in self[1:]))

    def whole_blocks(self, tokens: int, seed: int) -> Int[np.ndarray, " n"]:
        """Rows of all tokens of some blocks, drawn at random: of as many as hold so many tokens."""
        blocks, sizes = np.unique(self.block, return_counts=True)
        order = np.random.default_rng(seed).permutation(len(blocks))
        chosen = blocks[order[: int(np.searchsorted(sizes[order].cumsum(), tokens)) + 1]]
        return np.flatnonzero(np.isin(self.block, chosen))


@dataclass(frozen=True)
class Firings:
    """Feature activations on a sample: [tokens, d_sae], zero where a feature does not fire."""

    values: csc_matrix

    @classmethod
    def of(cls, dictionary: Dictionary, sample: Sample) -> "Firings":
        """Of every token."""
        starts = range(0, len(sample.acts), _ROWS)
        parts = (
            (np.arange(start, start + len(x)), x) for start, x in zip(starts, sample.acts.split(_ROWS), strict=True)
        )
        return cls.of_parts(dictionary, parts, len(sample.acts))

    @classmethod
    def of_parts(cls, dictionary: Dictionary, parts: Iterable[tuple[np.ndarray, Tensor]], tokens: int) -> "Firings":
        """Of activations that come part by part, each with the numbers of its tokens, of so many in all; holds what
        fires, and no dense array."""
        rows, features, values = [], [], []
        for numbers, x in parts:
            acts = dictionary.encode_sparse(x)
            rows.append(numbers[acts.row.numpy()])
            features.append(acts.feature.numpy())
            values.append(acts.value.numpy())
        places = np.concatenate(rows), np.concatenate(features)
        return cls(csc_matrix((np.concatenate(values), places), (tokens, dictionary.d_sae)))

    def at(self, rows: Int[np.ndarray, " n"]) -> "Firings":
        """On some of the tokens."""
        return Firings(self.values.tocsr()[rows].tocsc())

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


def random_directions(d_sae: int, k: int, sample: Sample, seed: int = 0) -> Dictionary:
    """So many random unit directions, read where they exceed the threshold at which k fire on a token."""
    rows = torch.randn(d_sae, sample.acts.shape[1], generator=torch.Generator().manual_seed(seed))
    return basis(rows, k, sample.acts)


def principal_directions(k: int, sample: Sample) -> Dictionary:
    """The principal components of the sample, each in both directions, likewise."""
    x = sample.acts[:CALIBRATED_ON].float()
    rows = torch.linalg.eigh(torch.cov((x - x.mean(0)).T)).eigenvectors.T
    return basis(torch.cat([rows, -rows]), k, x)


def basis(rows: Float[Tensor, "n d_model"], k: int, x: Float[Tensor, "tokens d_model"]) -> Dictionary:
    """Directions as a dictionary: projections, in standard deviations of each, above one threshold for all.

    A direction in which nothing varies never fires.
    """
    x = x[:CALIBRATED_ON].float()
    rows, mean = normalize(rows, dim=1), x.mean(0)
    std = ((x - mean) @ rows.T).std(0)
    W_enc = rows.T * torch.where(std > 0, 1 / std, 0)
    z = torch.cat([part @ W_enc for part in (x - mean).split(_ROWS)])
    threshold = torch.topk(z.flatten(), k * len(x)).values[-1].clamp(min=0)
    config = {"architecture": "batch_top_k", "k": k}
    return Dictionary(W_enc.contiguous(), -mean @ W_enc, rows, mean, threshold.expand(len(rows)).clone(), config)


def top_tokens(firings: Firings, feature: int, sample: Sample, strings: Any, n: int = 20) -> list[str]:
    """The tokens among a feature's `n` strongest, the most frequent first."""
    ids, counts = np.unique(sample.token[firings.strongest(feature, n)], return_counts=True)
    return [strings[ids[i]] for i in np.argsort(-counts, kind="stable")]
