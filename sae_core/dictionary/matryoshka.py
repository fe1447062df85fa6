"""Matryoshka BatchTopK (Bussmann et al. 2025): the first features must do alone what all do together."""

import torch
from jaxtyping import Float32
from torch import Tensor

from sae_core.dictionary.batch_top_k import BatchTopK
from sae_core.dictionary.sparse import Pairs, decode, dots, sums, weighted_sums
from sae_core.dictionary.weights import Weights

PREFIXES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1)
"""Nested prefixes of the dictionary, as shares of it."""


class MatryoshkaBatchTopK(BatchTopK):
    """As BatchTopK, but every prefix of the features reconstructs the input, too:

        x_hat_m = sum over i < m of f_i W_dec[i] + b_dec
        loss = mean over prefixes m of (mean |x - x_hat_m|^2) / variance + coefficient * AuxK

    The mean over the prefixes (as in dictionary_learning; SAELens sums) keeps the loss on BatchTopK's scale. AuxK's
    residual is that of the whole dictionary.
    """

    def reconstruct(
        self, weights: Weights, centered: Float32[Tensor, "batch d_model"], pairs: Pairs, value: Float32[Tensor, " nnz"]
    ) -> tuple[Weights, Float32[Tensor, "batch d_model"]]:
        """As `BatchTopK.reconstruct`: a feature hears from every prefix that it is part of.

        Each row is laid out once for each prefix, and a pair belongs to the copy of the first prefix that holds its
        feature; so sums over prefixes are running sums over copies.
        """
        d_sae, n = len(weights.b_enc), len(centered)
        ends = torch.tensor(sorted({max(1, round(share * d_sae)) for share in PREFIXES}), device=value.device)
        first = torch.bucketize(pairs.feature, ends, right=True, out_int32=True)
        nested = Pairs(pairs.row + n * first, pairs.feature)
        parts = decode(nested, value, weights.W_dec, n * len(ends)).view(len(ends), n, -1)
        error = parts.cumsum(0) - centered
        upstream = error.flip(0).cumsum(0).flip(0) * (2 / (n * self.variance * len(ends)))
        table = upstream.flatten(0, 1)
        d_value = dots(weights.W_dec, nested.feature, table, nested.row)
        gradients = Weights(
            W_enc=weighted_sums(centered, pairs.row, d_value, pairs.feature, d_sae),
            b_enc=sums(d_value, pairs.feature, d_sae),
            W_dec=weighted_sums(table, nested.row, value, nested.feature, d_sae),
            b_dec=upstream[0].sum(0),
        )
        return gradients, error[-1]
