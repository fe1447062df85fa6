"""Matryoshka BatchTopK (Bussmann et al. 2025): the first features must do alone what all do together."""

import torch
from jaxtyping import Float32
from torch import Tensor

from sae_core.dictionary.architecture import sparse_gradients
from sae_core.dictionary.batch_top_k import BatchTopK
from sae_core.dictionary.sparse import Groups, Pairs, dots, group_sums
from sae_core.dictionary.weights import Learner

PREFIXES = (1 / 32, 1 / 16, 1 / 8, 1 / 4, 1)
"""Nested prefixes of the dictionary, as shares of it."""


class MatryoshkaBatchTopK(BatchTopK):
    """As BatchTopK, but every prefix of the features reconstructs the input, too:

        x_hat_m = sum over i < m of f_i W_dec[i] + b_dec
        loss = mean over prefixes m of (mean |x - x_hat_m|^2) / variance + coefficient * AuxK

    The mean over the prefixes (as in dictionary_learning; SAELens sums) keeps the loss on BatchTopK's scale. AuxK's
    residual is that of the whole dictionary.
    """

    def learn(
        self,
        learner: Learner,
        read: Float32[Tensor, "batch d_model"],
        wanted: Float32[Tensor, "batch d_model"],
        pairs: Pairs,
        value: Float32[Tensor, " nnz"],
    ) -> tuple[Float32[Tensor, "batch d_model"], Float32[Tensor, " d_model"]]:
        """As `BatchTopK.learn`: a feature hears from every prefix that it is part of.

        Each row is laid out once for each prefix, and a pair belongs to the copy of the first prefix that holds its
        feature; so sums over prefixes are running sums over copies.
        """
        W_dec, n = learner.weights.W_dec, len(wanted)
        d_sae = len(W_dec)
        ends = torch.tensor(sorted({max(1, round(share * d_sae)) for share in PREFIXES}), device=value.device)
        first = torch.bucketize(pairs.feature, ends, right=True, out_int32=True)
        copy = pairs.row + n * first
        parts = wanted.new_empty(len(ends), *wanted.shape)
        group_sums(W_dec, pairs.feature, value, Groups.by(copy, n * len(ends)), parts.flatten(0, 1))
        error = parts.cumsum(0) - wanted
        upstream = error.flip(0).cumsum(0).flip(0) * (2 / (n * self.variance * len(ends)))
        table = upstream.flatten(0, 1)
        d_value = dots(W_dec, pairs.feature, table, copy)
        sparse_gradients(learner, pairs, value, d_value, read, table, copy)
        return error[-1], upstream[0].sum(0)
