"""TopK with AuxK (Gao et al. 2024): the k largest activations of each token."""

import torch
from jaxtyping import Float32, Int64
from torch import Tensor
from torch.nn.functional import linear

from sae_core.dictionary.architecture import pre_acts
from sae_core.dictionary.batch_top_k import BatchTopK
from sae_core.dictionary.sparse import BLOCK_BYTES, Pairs, low_precision
from sae_core.dictionary.weights import Learner


class TopK(BatchTopK):
    """As BatchTopK, but

        f = z where z is positive and among the k largest of its row, else 0

    At inference a threshold takes the place of the ranks, as with BatchTopK: the one at which k features are active
    on a token on average. Its running value is where the k * batch largest of the batch would end.
    """

    def select(
        self, learner: Learner, centered: Float32[Tensor, "batch d_model"]
    ) -> tuple[Pairs, Float32[Tensor, " nnz"]]:
        """The selected pairs, in feature order, and their activations in float32.

        The encoder product proposes twice as many in a row as are wanted, so that its rounding can hardly have missed
        one; which of them are the largest is decided in float32.
        """
        n = len(centered)
        proposed = _largest(learner, centered, 2 * self.k)
        per_row = proposed.shape[1]
        order = proposed.flatten().argsort(stable=True)
        pairs = Pairs((order // per_row).int(), proposed.flatten()[order].int())
        z = pre_acts(learner.weights, centered, pairs)
        by_row = torch.empty_like(z).scatter_(0, order, z).view(n, per_row)
        chosen = torch.zeros_like(by_row, dtype=torch.bool).scatter_(1, by_row.topk(self.k, dim=1).indices, True)
        self.remember(max(0.0, float(z.kthvalue(len(z) - self.k * n + 1).values)))
        where = (chosen & (by_row > 0)).flatten()[order].nonzero().squeeze(1)
        return pairs.at(where), z[where]


def _largest(
    learner: Learner, centered: Float32[Tensor, "batch d_model"], count: int
) -> Int64[Tensor, "batch per_row"]:
    """The features with the largest pre-activations of each row, in the encoder product's arithmetic."""
    weight, bias = learner.W_enc_low, low_precision(learner.weights.b_enc)
    rows = max(1, BLOCK_BYTES // (len(weight) * weight.element_size()))
    blocks = low_precision(centered).split(rows)
    return torch.cat([linear(block, weight, bias).topk(min(count, len(weight)), dim=1).indices for block in blocks])
