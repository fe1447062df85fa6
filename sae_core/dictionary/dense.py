"""The dense step of what a penalty makes sparse, whose features are all at work at first."""

from abc import abstractmethod
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor
from torch.nn.functional import linear

from sae_core.dictionary.architecture import Architecture, Step, b_dec_gradient
from sae_core.dictionary.sparse import low_precision, rows_of_block
from sae_core.dictionary.weights import Learner, Weights


class Block(NamedTuple):
    """Some rows of a batch on their way back, in the encoder's arithmetic."""

    centered: Float32[Tensor, "rows d_model"]
    """x - b_dec."""
    z: Float[Tensor, "rows d_sae"]
    """Pre-activations; where `acts` works in place, activations."""
    f: Float[Tensor, "rows d_sae"]
    """Activations."""
    active: Bool[Tensor, "rows d_sae"]
    d_f: Float[Tensor, "rows d_sae"]
    """Gradient of the reconstruction loss; may be written over."""
    W_dec: Float[Tensor, "d_sae d_model"]
    scale: float
    """What a squared error weighs in the loss: 1 / (batch * variance)."""
    penalty: float
    """What an activation's penalty weighs in the loss, warmed up."""


class Dense(Architecture):
    """The architecture

        z = W_enc (x - b_dec) + b_enc
        x_hat = W_dec f(z) + b_dec,   |W_dec[i]| = 1
        loss = (mean |x - x_hat|^2 + l1_coefficient * mean sum of penalties) / variance

    Half of all features are active at first, so products are dense, in the encoder's arithmetic, a block of rows at a
    time. No feature is revived.

    The encoder starts as the decoder, shorter: 2 d_model / d_sae, with which half of the features, firing at random,
    reconstruct an input at its own length (after Gao et al. 2024).
    """

    warm_up: float
    """Share of the steps over which the penalty's coefficient rises from 0."""

    def __init__(self, l1_coefficient: float, variance: float) -> None:
        self.l1_coefficient, self.variance = l1_coefficient, variance

    def start(self, weights: Weights) -> Weights:
        """Weights with a shorter encoder."""
        d_sae, d_model = weights.W_enc.shape
        weights.W_enc.mul_(min(1.0, 2 * d_model / d_sae))
        return weights

    @abstractmethod
    def acts(self, weights: Weights, z: Float[Tensor, "rows d_sae"]) -> Float[Tensor, "rows d_sae"]:
        """Activations of the pre-activations, which may be written over where `pull_back` has no use for them."""

    @abstractmethod
    def pull_back(self, learner: Learner, block: Block) -> tuple[Float[Tensor, "rows d_sae"], Float32[Tensor, ""]]:
        """The gradient of z, and the sum of the block's penalties before their coefficient.

        Adds to the gradients of what is neither a matrix nor b_enc nor b_dec.
        """

    def step(
        self, learner: Learner, x: Float32[Tensor, "batch d_model"], dead: Bool[Tensor, " d_sae"], progress: float
    ) -> Step:
        """As `Architecture.step`; `dead` is of no use here."""
        weights, gradients = learner.weights, learner.gradients.zero_()
        W_dec, b_enc = low_precision(weights.W_dec), low_precision(weights.b_enc)
        scale = 1 / (len(x) * self.variance)
        penalty = scale * self.l1_coefficient * min(1.0, progress / self.warm_up)
        n_fired = torch.zeros_like(dead, dtype=torch.int64)
        squared_error, penalties = torch.zeros((), device=x.device), torch.zeros((), device=x.device)
        error_sum = torch.zeros_like(weights.b_dec)
        rows = rows_of_block(W_dec)
        for block in (x - weights.b_dec).split(rows):
            low = low_precision(block)
            z = linear(low, learner.W_enc_low, b_enc)
            f = self.acts(weights, z)
            active = f > 0
            error = (f @ W_dec).float() - block
            upstream = low_precision(error * (2 * scale))
            d_f = upstream @ W_dec.T
            d_z, cost = self.pull_back(learner, Block(block, z, f, active, d_f, W_dec, scale, penalty))
            gradients.W_enc.add_(d_z.T @ low)
            gradients.b_enc.add_(d_z.sum(0, dtype=torch.float32))
            gradients.W_dec.add_(f.T @ upstream)
            error_sum += error.sum(0)
            n_fired += active.sum(0)
            squared_error += error.square().sum()
            penalties += cost
        b_dec_gradient(learner, error_sum * (2 * scale))
        return Step(float(squared_error), int(n_fired.sum()), n_fired, float(penalties) / len(x))
