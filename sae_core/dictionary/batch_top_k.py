"""BatchTopK (Bussmann et al. 2024): the k * batch largest activations of a batch, wherever they fall."""

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float32, Int64
from torch import Tensor

from sae_core.dictionary.aux_k import add_aux_k
from sae_core.dictionary.sparse import Pairs, decode, dots, low_precision, propose, sums, weighted_sums
from sae_core.dictionary.weights import Learner, Weights

GUESS = 0.9
"""Pairs are proposed from this share of the last batches' smallest selected activation ..."""
SAFE = 0.95
"""... which must turn out to be at most this share of this batch's, so that bfloat16 can have missed none."""
MEMORY = 0.5
"""Decay of the running smallest selected activation: short, for it falls fast at first, and one batch says it well."""


class Step(NamedTuple):
    """What one batch says of the weights."""

    gradients: Weights
    squared_error: float
    """Sum over the batch of |x - x_hat|^2."""
    n_active: int
    """Activations selected in the batch, all rows together."""
    n_fired: Int64[Tensor, " d_sae"]
    """How often each feature was selected."""
    aux: float
    """The auxiliary loss, before its coefficient."""


class BatchTopK:
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

    @property
    def threshold(self) -> float:
        """The running smallest selected activation; 0 before the first batch."""
        total, count = self._smallest.tolist()
        return total / count if count else 0.0

    def step(self, learner: Learner, x: Float32[Tensor, "batch d_model"], dead: Bool[Tensor, " d_sae"]) -> Step:
        """Gradients of the loss on a batch, and what came of it. Advances the running threshold.

        Args:
            learner: the weights, which are left as they are.
            x: inputs, scaled so that E|x|^2 = d_model.
            dead: the features that AuxK is to revive.
        """
        weights = learner.weights
        centered = x - weights.b_dec
        pairs, value = self.select(learner, centered)
        error = decode(pairs, value, weights.W_dec, len(x)) - centered
        upstream = error * (2 / (len(x) * self.variance))
        d_value = dots(weights.W_dec, pairs.feature, upstream, pairs.row)
        d_sae = len(weights.b_enc)
        gradients = Weights(
            W_enc=weighted_sums(centered, pairs.row, d_value, pairs.feature, d_sae),
            b_enc=sums(d_value, pairs.feature, d_sae),
            W_dec=weighted_sums(upstream, pairs.row, value, pairs.feature, d_sae),
            b_dec=upstream.sum(0),
        )
        aux = add_aux_k(gradients, learner, centered, -error, dead, self.aux_coefficient)
        gradients.b_dec.sub_(gradients.b_enc @ weights.W_enc)  # b_dec is taken from the encoder's input, too
        n_fired = torch.bincount(pairs.feature, minlength=d_sae)
        return Step(gradients, float(error.square().sum()), len(value), n_fired, aux)

    def select(
        self, learner: Learner, centered: Float32[Tensor, "batch d_model"]
    ) -> tuple[Pairs, Float32[Tensor, " nnz"]]:
        """The selected pairs, in feature order, and their activations in float32."""
        count = self.k * len(centered)
        limit = GUESS * (self.threshold or _first_guess(learner, centered, self.k))
        while True:
            pairs, z = _candidates(learner, centered, limit)
            smallest = float(z.kthvalue(len(z) - count + 1).values) if len(z) >= count else -torch.inf
            if limit == 0 or limit <= SAFE * smallest:
                break
            limit = GUESS * smallest if smallest > 0 else limit / 2 if limit > 1e-6 else 0.0
        where = _largest(z, count, max(smallest, 0.0))
        pairs, value = pairs.at(where), z[where]
        if len(value):
            self._smallest = MEMORY * self._smallest + torch.tensor([float(value.min()), 1.0], dtype=torch.float64)
        return pairs, value

    def state(self) -> dict[str, Tensor]:
        """What the next step depends on, besides the weights."""
        return {"smallest": self._smallest}

    def restore(self, state: dict[str, Tensor]) -> "BatchTopK":
        """Go on from what `state` gave."""
        self._smallest = state["smallest"].cpu()
        return self


def _candidates(
    learner: Learner, centered: Float32[Tensor, "batch d_model"], limit: float
) -> tuple[Pairs, Float32[Tensor, " nnz"]]:
    """Pairs whose pre-activation is above `limit` or close to it, and the pre-activations in float32."""
    weights = learner.weights
    pairs = propose(low_precision(centered), learner.W_enc_low, low_precision(weights.b_enc - limit))
    return pairs, dots(weights.W_enc, pairs.feature, centered, pairs.row) + weights.b_enc[pairs.feature]


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
