"""What every architecture is to the trainer, and the sparse step that most of them share."""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float32, Int32, Int64
from torch import Tensor

from sae_core.dictionary.sparse import Groups, Pairs, dots, group_sums, low_precision, propose, sums
from sae_core.dictionary.weights import Learner, Weights


class Step(NamedTuple):
    """What one batch says of the weights."""

    squared_error: float
    """Sum over the batch of |x - x_hat|^2."""
    n_active: int
    """Activations other than zero in the batch, all rows together."""
    n_fired: Int64[Tensor, " d_sae"]
    """How often each feature was active."""
    aux: float
    """The auxiliary loss, or the penalty of what has one instead, before its coefficient."""


class Architecture(ABC):
    """How a dictionary encodes while it is trained, its loss, and the gradients of that.

    All see inputs scaled so that E|x|^2 = d_model, keep decoder rows at unit norm, and divide the loss by the inputs'
    variance, so that learning rates and the clipping of gradients mean the same to each.
    """

    def start(self, weights: Weights) -> Weights:
        """The weights to start from, given the usual ones; may change these."""
        return weights

    @abstractmethod
    def step(
        self, learner: Learner, x: Float32[Tensor, "batch *site d_model"], dead: Bool[Tensor, " d_sae"], progress: float
    ) -> Step:
        """Find the gradients of the loss on a batch; returns what else came of it.

        Args:
            learner: the weights, which are left as they are, and their gradients, which are written over.
            x: inputs, scaled so that E|x|^2 = d_model.
            dead: the features that AuxK is to revive.
            progress: share of all steps that were taken before this one.
        """

    def encoder(self, weights: Weights) -> tuple[Float32[Tensor, "d_sae d_model"], Float32[Tensor, " d_sae"]]:
        """Directions and biases at inference, in the scaled units: activations are what exceeds the thresholds."""
        return weights.W_enc, weights.b_enc

    @abstractmethod
    def thresholds(self, weights: Weights) -> float | Float32[Tensor, " d_sae"]:
        """What a feature must exceed at inference: one number for all, or one each, in the scaled units."""

    def state(self) -> dict[str, Tensor]:
        """What the next step depends on, besides the weights."""
        return {}

    def restore(self, state: dict[str, Tensor]) -> "Architecture":
        """Go on from what `state` gave."""
        return self


def candidates(
    learner: Learner,
    centered: Float32[Tensor, "batch d_model"],
    limit: float | Float32[Tensor, " d_sae"] = 0.0,
    k: int | None = None,
) -> tuple[Pairs, Float32[Tensor, " nnz"]]:
    """Pairs whose pre-activation is above `limit` or close to it, and the pre-activations in float32.

    With `k`, only those that may be among the k largest of their row.
    """
    weights = learner.weights
    pairs = propose(low_precision(centered), learner.W_enc_low, low_precision(weights.b_enc - limit), k)
    return pairs, dots(weights.W_enc, pairs.feature, centered, pairs.row) + weights.b_enc[pairs.feature]


def sparse_gradients(
    learner: Learner,
    pairs: Pairs,
    value: Float32[Tensor, " nnz"],
    d_value: Float32[Tensor, " nnz"],
    centered: Float32[Tensor, "batch d_model"],
    upstream: Float32[Tensor, "rows d_model"],
    upstream_row: Int32[Tensor, " nnz"],
) -> None:
    """Set the gradients of both matrices and of b_enc.

    Args:
        learner: whose gradients are set.
        pairs: the active ones.
        value: their activations.
        d_value: the gradients of these.
        centered: the encoder's input.
        upstream: gradients of what the decoder's output is added to; a common factor may be in `value` in their stead.
        upstream_row: which row of it each pair adds to.
    """
    gradients, d_sae = learner.gradients, len(learner.weights.b_enc)
    groups = Groups.by(pairs.feature, d_sae)
    group_sums(centered, pairs.row, d_value, groups, gradients.W_enc)
    group_sums(upstream, upstream_row, value, groups, gradients.W_dec)
    gradients.b_enc.copy_(sums(d_value, groups))


def b_dec_gradient(learner: Learner, of_output: Float32[Tensor, " d_model"]) -> None:
    """Set b_dec's gradient, b_enc's being complete: b_dec is added to the output and taken from the encoder's input."""
    gradients, weights = learner.gradients, learner.weights
    torch.sub(of_output, gradients.b_enc @ weights.W_enc, out=gradients.b_dec)
