"""Transcoder (Dunefsky et al. 2024): reads the activations of one site and writes those of another."""

from dataclasses import replace

from jaxtyping import Bool, Float, Float32
from torch import Tensor

from sae_core.dictionary.architecture import Step
from sae_core.dictionary.batch_top_k import BatchTopK
from sae_core.dictionary.weights import Learner, Weights


class Transcoder(BatchTopK):
    """The architecture, of x read at one site and y, of the same tokens, at another

        z = W_enc x + b_enc
        f = z where z is positive and among the k * batch largest of the batch, else 0
        y_hat = W_dec f + b_dec,   |W_dec[i]| = 1
        loss = mean |y - y_hat|^2 / variance of y + coefficient * AuxK

    with BatchTopK's threshold at inference. What a feature reads says nothing of what it writes, so the encoder does
    not start as the decoder but in random directions of its own.
    """

    def start(self, weights: Weights) -> Weights:
        """Weights whose encoder is the decoder in another order: random rows of unit norm, as independent of it."""
        return super().start(replace(weights, W_enc=weights.W_dec.roll(1, dims=0)))

    def step(
        self, learner: Learner, x: Float32[Tensor, "batch 2 d_model"], dead: Bool[Tensor, " d_sae"], progress: float
    ) -> Step:
        """As `Architecture.step`, of pairs: what is read, and what is to be written."""
        read, written = sides(x)
        taken, of_output = self.fit(learner, read, written - learner.weights.b_dec, dead)
        learner.gradients.b_dec.copy_(of_output)
        return taken


def sides(
    x: Float[Tensor, "batch *site d_model"],
) -> tuple[Float[Tensor, "batch d_model"], Float[Tensor, "batch d_model"]]:
    """What a dictionary reads and what it is to give: of one site the same, of a pair the one and the other."""
    return (x, x) if x.dim() == 2 else (x[:, 0].contiguous(), x[:, 1].contiguous())
