"""ReLU with an L1 penalty: the recipe of "Scaling Monosemanticity" (Templeton et al. 2024; Anthropic, April 2024)."""

import torch
from jaxtyping import Bool, Float32
from torch import Tensor
from torch.nn.functional import linear

from sae_core.dictionary.architecture import Architecture, Step, b_dec_gradient
from sae_core.dictionary.sparse import BLOCK_BYTES, low_precision
from sae_core.dictionary.weights import Learner, Weights

WARM_UP = 0.05
"""Share of the steps over which the penalty's coefficient rises from 0 (Anthropic, April 2024)."""


class ReLU(Architecture):
    """The architecture

        z = W_enc (x - b_dec) + b_enc
        f = relu(z)
        x_hat = W_dec f + b_dec,   |W_dec[i]| = 1
        loss = (mean |x - x_hat|^2 + l1_coefficient * mean of sum_i f_i |W_dec[i]|) / variance

    The paper leaves decoder norms free and weighs each activation by its own in the penalty: nothing changes when
    norm moves from a decoder row to its activation, so that unit rows lose nothing and come out folded.

    The encoder starts as the decoder, shorter: 2 d_model / d_sae, with which half of the features, firing at random,
    reconstruct an input at its own length (after Gao et al. 2024); the paper gets there by short decoder rows.
    """

    def __init__(self, l1_coefficient: float, variance: float) -> None:
        self.l1_coefficient, self.variance = l1_coefficient, variance

    def start(self, weights: Weights) -> Weights:
        """Weights with a shorter encoder."""
        d_sae, d_model = weights.W_enc.shape
        weights.W_enc.mul_(min(1.0, 2 * d_model / d_sae))
        return weights

    def thresholds(self, weights: Weights) -> float:
        """0: whatever is positive is active."""
        return 0.0

    def step(
        self, learner: Learner, x: Float32[Tensor, "batch d_model"], dead: Bool[Tensor, " d_sae"], progress: float
    ) -> Step:
        """As `Architecture.step`; `dead` is of no use here.

        Half of all features are active at first, so products are dense, in the encoder's arithmetic, a block of rows
        at a time.
        """
        weights, gradients = learner.weights, learner.gradients.zero_()
        W_dec, b_enc = low_precision(weights.W_dec), low_precision(weights.b_enc)
        scale = 1 / (len(x) * self.variance)
        penalty = scale * self.l1_coefficient * min(1.0, progress / WARM_UP)
        n_fired = torch.zeros_like(dead, dtype=torch.int64)
        squared_error, l1 = torch.zeros((), device=x.device), torch.zeros((), device=x.device)
        error_sum = torch.zeros_like(weights.b_dec)
        rows = max(1, BLOCK_BYTES // (len(W_dec) * W_dec.element_size()))
        for block in (x - weights.b_dec).split(rows):
            low = low_precision(block)
            f = linear(low, learner.W_enc_low, b_enc).relu_()
            active = f > 0
            error = (f @ W_dec).float() - block
            upstream = low_precision(error * (2 * scale))
            d_z = (upstream @ W_dec.T).add_(penalty).mul_(active)
            gradients.W_enc.add_(d_z.T @ low)
            gradients.b_enc.add_(d_z.sum(0, dtype=torch.float32))
            gradients.W_dec.add_(f.T @ upstream)
            error_sum += error.sum(0)
            n_fired += active.sum(0)
            squared_error += error.square().sum()
            l1 += f.sum(dtype=torch.float32)
        b_dec_gradient(learner, error_sum * (2 * scale))
        return Step(float(squared_error), int(n_fired.sum()), n_fired, float(l1) / len(x))
