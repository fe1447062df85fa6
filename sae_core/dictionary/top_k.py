"""TopK with AuxK (Gao et al. 2024): the k largest activations of each token."""

from jaxtyping import Float32
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
        where = pairs.largest(z, len(centered), self.k)
        return pairs.at(where), z[where]
