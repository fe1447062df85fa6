"""BatchTopK (Bussmann et al. 2024): the k * batch largest activations of a batch, wherever they fall."""

import math

import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor

from sae_core.dictionary.architecture import Architecture, Step, b_dec_gradient, candidates, sparse_gradients
from sae_core.dictionary.aux_k import add_aux_k
from sae_core.dictionary.sparse import Pairs, kth_largest, reconstruct
from sae_core.dictionary.weights import Learner, Weights

GUESS = 0.94
"""Pairs are proposed from this share of the last batches' smallest selected activation ..."""
SAFE = 0.98
"""... which must turn out to be at most this share of this batch's, so that bfloat16 can have missed none."""
MEMORY = 0.5
"""Decay of the running smallest selected activation: short, for it falls fast at first, and one batch says it well."""


class BatchTopK(Architecture):
    """The architecture

        z = W_enc (x - b_dec) + b_enc
        f = z where z is positive and among the k * batch largest of the batch, else 0
        x_hat = W_dec f + b_dec,   |W_dec[i]| = 1
        loss = mean |x - x_hat|^2 / variance + coefficient * AuxK

    At inference a threshold takes the place of the batch: the running smallest selected activation (an average with
    bias correction), which also tells where to look for the next batch's selection.
    """

    def __init__(self, k: int, aux_coefficient: float, variance: float) -> None:
        self.k, self.aux_coefficient, self.variance = k, aux_coefficient, variance
        self._smallest = torch.zeros(2, dtype=torch.float64)  # decayed sum, and the decayed count it is over

    def start(self, weights: Weights) -> Weights:
        """Weights whose first reconstructions have the right length (Gao et al. 2024 scale the encoder to that end).

        The k largest of d_sae random directions each meet an input of norm sqrt(d_model) with about z^2 =
        2 ln(d_sae / k); their sum is too long by 1 + k z^2 / d_model, in the sense of least squares.
        """
        d_sae, d_model = weights.W_enc.shape
        weights.W_enc.div_(1 + 2 * self.k * math.log(d_sae / self.k) / d_model)
        return weights

    @property
    def threshold(self) -> float:
        """The running smallest selected activation; 0 before the first batch."""
        total, count = self._smallest.tolist()
        return total / count if count else 0.0

    def thresholds(self, weights: Weights) -> float:
        """The running threshold, for all features."""
        return self.threshold

    def step(
        self, learner: Learner, x: Float32[Tensor, "batch d_model"], dead: Bool[Tensor, " d_sae"], progress: float
    ) -> Step:
        """As `Architecture.step`. Advances the running threshold."""
        centered = x - learner.weights.b_dec
        taken, of_output = self.fit(learner, centered, centered, dead)
        b_dec_gradient(learner, of_output)
        return taken

    def fit(
        self,
        learner: Learner,
        read: Float32[Tensor, "batch d_model"],
        wanted: Float32[Tensor, "batch d_model"],
        dead: Bool[Tensor, " d_sae"],
    ) -> tuple[Step, Float32[Tensor, " d_model"]]:
        """Set all gradients but b_dec's; returns what came of it, and the gradient of what is added to the output.

        Args:
            learner: as in `step`.
            read: the encoder's input.
            wanted: what the output should be, less b_dec.
            dead: as in `step`.
        """
        pairs, value = self.select(learner, read)
        error, of_output = self.learn(learner, read, wanted, pairs, value)
        aux = add_aux_k(learner, read, error, dead, self.aux_coefficient)
        n_fired = torch.bincount(pairs.feature, minlength=len(dead))
        return Step(float(torch.linalg.vector_norm(error) ** 2), len(value), n_fired, aux), of_output

    def learn(
        self,
        learner: Learner,
        read: Float32[Tensor, "batch d_model"],
        wanted: Float32[Tensor, "batch d_model"],
        pairs: Pairs,
        value: Float32[Tensor, " nnz"],
    ) -> tuple[Float32[Tensor, "batch d_model"], Float32[Tensor, " d_model"]]:
        """Set the gradients of the reconstruction loss, b_dec's aside.

        Returns:
            The output's error, and the gradient of what is added to every row of the output.
        """
        error, pull = reconstruct(pairs, value, learner.weights.W_dec, wanted)
        scale = 2 / (len(wanted) * self.variance)
        sparse_gradients(learner, pairs, value * scale, pull.mul_(scale), read, error, pairs.row)
        return error, error.sum(0).mul_(scale)

    def select(
        self, learner: Learner, centered: Float32[Tensor, "batch d_model"]
    ) -> tuple[Pairs, Float32[Tensor, " nnz"]]:
        """The selected pairs, and their activations in float32."""
        count = self.k * len(centered)
        limit = GUESS * (self.threshold or _first_guess(learner, centered, self.k))
        while True:
            pairs, z = candidates(learner, centered, limit)
            smallest = kth_largest(z, count)
            if limit == 0 or limit <= SAFE * smallest:
                break
            limit = GUESS * smallest if smallest > 0 else limit / 2 if limit > 1e-6 else 0.0
        where = _largest(z, count, max(smallest, 0.0))
        pairs, value = pairs.at(where), z[where]
        if len(value):
            self.remember(float(value.min()))
        return pairs, value

    def remember(self, smallest: float) -> None:
        """Take a batch's smallest selected activation into the running one."""
        self._smallest = MEMORY * self._smallest + torch.tensor([smallest, 1.0], dtype=torch.float64)

    def state(self) -> dict[str, Tensor]:
        """What the next step depends on, besides the weights."""
        return {"smallest": self._smallest}

    def restore(self, state: dict[str, Tensor]) -> "BatchTopK":
        """Go on from what `state` gave."""
        self._smallest = state["smallest"].cpu()
        return self


def _first_guess(learner: Learner, centered: Float32[Tensor, "batch d_model"], k: int) -> float:
    """Where the selection would end, from a few rows."""
    rows = centered[:64]
    z = rows @ learner.weights.W_enc.T + learner.weights.b_enc
    return max(0.0, float(z.flatten().topk(k * len(rows)).values[-1]))


def _largest(z: Float32[Tensor, " n"], count: int, smallest: float) -> Int64[Tensor, " kept"]:
    """Places, in order, of the positive values that are among the `count` largest, the last of which is `smallest`.

    Of equal values at the end the first ones are taken.
    """
    above = (z > smallest).nonzero().squeeze(1)
    if not smallest:
        return above
    ties = (z == smallest).nonzero().squeeze(1)[: count - len(above)]
    return torch.cat([above, ties]).sort().values
