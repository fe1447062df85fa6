"""TopK with AuxK (Gao et al. 2024): the k largest activations of each token."""

import torch
from jaxtyping import Bool, Float32, Int32
from torch import Tensor

from sae_core.dictionary.architecture import candidates
from sae_core.dictionary.batch_top_k import BatchTopK
from sae_core.dictionary.sparse import Pairs, kth_largest
from sae_core.dictionary.weights import Learner


class TopK(BatchTopK):
    """As BatchTopK, but

        f = z where z is positive and among the k largest of its row, else 0

    At inference a threshold takes the place of the ranks, as with BatchTopK: the one at which k features are active
    on a token on average. Its running value is where the k * batch largest of the proposed pairs end.
    """

    def select(
        self, learner: Learner, centered: Float32[Tensor, "batch d_model"]
    ) -> tuple[Pairs, Float32[Tensor, " nnz"]]:
        """The selected pairs, and their activations in float32, in which ranks are decided."""
        pairs, z = candidates(learner, centered, k=self.k)
        self.remember(max(0.0, kth_largest(z, self.k * len(centered))))
        where = (largest_of_rows(pairs.row, z, len(centered), self.k) & (z > 0)).nonzero().squeeze(1)
        return pairs.at(where), z[where]


def largest_of_rows(
    row: Int32[Tensor, " nnz"], z: Float32[Tensor, " nnz"], n_rows: int, k: int
) -> Bool[Tensor, " nnz"]:
    """Which values are among the k largest of their row; `row` is sorted."""
    counts = torch.bincount(row, minlength=n_rows)
    width = int(counts.max())
    if width <= k:
        return torch.ones_like(z, dtype=torch.bool)
    column = torch.arange(len(z), device=z.device) - (counts.cumsum(0) - counts)[row]
    place = row * width + column
    table = z.new_full((n_rows * width,), -torch.inf).index_put_((place,), z).view(n_rows, width)
    top = table.topk(k, dim=1).indices
    return torch.zeros_like(table, dtype=torch.bool).scatter_(1, top, True).view(-1)[place]
