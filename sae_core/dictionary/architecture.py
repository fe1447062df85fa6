"""What every architecture is to the trainer, and the sparse step that most of them share."""

from abc import ABC, abstractmethod
from typing import NamedTuple

from jaxtyping import Bool, Float32, Int64
from torch import Tensor

from sae_core.dictionary.sparse import Pairs, dots, low_precision, propose, sums, weighted_sums
from sae_core.dictionary.weights import Learner, Weights


class Step(NamedTuple):
    """What one batch says of the weights."""

    gradients: Weights
    squared_error: float
    """Sum over the batch of |x - x_hat|^2."""
    n_active: int
    """Activations other than zero in the batch, all rows together."""
    n_fired: Int64[Tensor, " d_sae"]
    """How often each feature was active."""
    aux: float
    """The auxiliary loss, or ReLU's sparsity penalty, before its coefficient."""


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
        self, learner: Learner, x: Float32[Tensor, "batch d_model"], dead: Bool[Tensor, " d_sae"], progress: float
    ) -> Step:
        """Gradients of the loss on a batch, and what came of it.

        Args:
            learner: the weights, which are left as they are.
            x: inputs, scaled so that E|x|^2 = d_model.
            dead: the features that AuxK is to revive.
            progress: share of all steps that were taken before this one.
        """

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
    learner: Learner, centered: Float32[Tensor, "batch d_model"], limit: float | Float32[Tensor, " d_sae"]
) -> tuple[Pairs, Float32[Tensor, " nnz"]]:
    """Pairs whose pre-activation is above `limit` or close to it, and the pre-activations in float32."""
    weights = learner.weights
    pairs = propose(low_precision(centered), learner.W_enc_low, low_precision(weights.b_enc - limit))
    return pairs, pre_acts(weights, centered, pairs)


def pre_acts(weights: Weights, centered: Float32[Tensor, "batch d_model"], pairs: Pairs) -> Float32[Tensor, " nnz"]:
    """The pairs' pre-activations in float32."""
    return dots(weights.W_enc, pairs.feature, centered, pairs.row) + weights.b_enc[pairs.feature]


def sparse_gradients(
    pairs: Pairs,
    value: Float32[Tensor, " nnz"],
    d_value: Float32[Tensor, " nnz"],
    centered: Float32[Tensor, "batch d_model"],
    upstream: Float32[Tensor, "batch d_model"],
    d_sae: int,
) -> Weights:
    """Gradients from those of the activations (`d_value`) and of the reconstruction (`upstream`).

    b_dec's is that of the reconstruction alone; `through_encoder` adds the rest when b_enc's is complete.
    """
    return Weights(
        W_enc=weighted_sums(centered, pairs.row, d_value, pairs.feature, d_sae),
        b_enc=sums(d_value, pairs.feature, d_sae),
        W_dec=weighted_sums(upstream, pairs.row, value, pairs.feature, d_sae),
        b_dec=upstream.sum(0),
    )


def through_encoder(gradients: Weights, weights: Weights) -> Weights:
    """The gradients with b_dec's completed, in place: b_dec is taken from the encoder's input, too."""
    gradients.b_dec.sub_(gradients.b_enc @ weights.W_enc)
    return gradients
