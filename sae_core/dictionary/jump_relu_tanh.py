"""JumpReLU with a tanh penalty: the recipe of "Dictionary Learning Optimization Techniques" (Anthropic, Jan. 2025)."""

from dataclasses import replace
from statistics import NormalDist

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from sae_core.dictionary.dense import Block, Dense
from sae_core.dictionary.sparse import low_precision
from sae_core.dictionary.weights import Learner, Weights

BANDWIDTH = 2.0
"""Width of the window around a threshold in which the jump has a gradient."""
SHARPNESS = 4.0
"""c: an activation of a few times 1 / c costs as much as any larger one."""
THRESHOLD = 0.1
"""Threshold at the start."""
PRE_ACT = 3e-6
"""Weight of what the pre-activations of silent features lack to their thresholds."""
ACTIVE = 10_000
"""Features active on an input at the start."""
LENGTH = 1 / 3
"""Length of the encoder's rows at the start, in units of d_model / d_sae.

The recipe's decoder starts uniform in +-1 / sqrt(d_model), so its rows are 1 / sqrt(3) long, and its encoder as
d_model / d_sae times that decoder. Norm moved from decoder to encoder makes the rows of the latter as long as this.
"""


class JumpReLUTanh(Dense):
    """The architecture

        z = W_enc (x - b_dec) + b_enc
        f = z H(z - threshold),   H the step function, threshold >= 0
        x_hat = W_dec f + b_dec,   |W_dec[i]| = 1
        loss = (mean |x - x_hat|^2 + l1_coefficient * mean of sum_i tanh(SHARPNESS f_i)
                + PRE_ACT * mean of sum_i relu(threshold_i - z_i)) / variance

    The coefficient rises over the whole run. Steps have no gradient, so one is made of the values near a threshold;
    unlike `JumpReLU`'s it goes to z, too, and so to all weights:

        df/dz = H(z - threshold) + threshold near / BANDWIDTH,   df/dthreshold = -threshold near / BANDWIDTH,
        near = 1 where |z - threshold| < BANDWIDTH / 2, else 0

    The recipe's decoder norms are free and weigh activations in the penalties, and it learns the logarithm of the
    threshold; here rows are unit and the threshold itself is learned, as in SAELens, where a logarithm was found to
    hardly move. SAELens applies the last term to dead features alone.
    """

    warm_up = 1.0

    def start(self, weights: Weights) -> Weights:
        """Weights with thresholds, a short encoder, and biases with which ACTIVE features fire, or half of them."""
        d_sae, d_model = weights.W_enc.shape
        length = LENGTH * d_model / d_sae
        deviations = NormalDist().inv_cdf(max(0.5, 1 - ACTIVE / d_sae))
        weights.W_enc.mul_(length)
        weights.b_enc.fill_(THRESHOLD - deviations * length * (self.variance / d_model) ** 0.5)
        return replace(weights, threshold=torch.full_like(weights.b_enc, THRESHOLD))

    def thresholds(self, weights: Weights) -> Float32[Tensor, " d_sae"]:
        """The learned thresholds."""
        assert weights.threshold is not None, "`start` made them"
        return weights.threshold

    def acts(self, weights: Weights, z: Float[Tensor, "rows d_sae"]) -> Float[Tensor, "rows d_sae"]:
        """As `Dense.acts`."""
        return z * (z > low_precision(self.thresholds(weights)))

    def pull_back(self, learner: Learner, block: Block) -> tuple[Float[Tensor, "rows d_sae"], Float32[Tensor, ""]]:
        """As `Dense.pull_back`."""
        threshold = low_precision(self.thresholds(learner.weights))
        over = block.z - threshold
        cost = (SHARPNESS * block.f).tanh_()
        total = cost.sum(dtype=torch.float32)
        d_f = block.d_f.add_(cost.square_().neg_().add_(1), alpha=SHARPNESS * block.penalty)
        d_jump = d_f * (over.abs() < BANDWIDTH / 2) * (threshold / BANDWIDTH)
        d_lacking = (over < 0) * (PRE_ACT * block.scale)
        self.thresholds(learner.gradients).add_((d_lacking - d_jump).sum(0, dtype=torch.float32))
        return d_f.mul_(block.active).add_(d_jump).sub_(d_lacking), total
