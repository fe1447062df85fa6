"""Gated (Rajamanoharan et al. 2024a): what decides whether a feature fires is learned apart from how much."""

from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor

from sae_core.dictionary.architecture import Step
from sae_core.dictionary.dense import Block, Dense
from sae_core.dictionary.sparse import low_precision
from sae_core.dictionary.weights import Learner, Weights


def as_threshold(
    b_gate: Float[Tensor, " d_sae"], b_mag: Float[Tensor, " d_sae"], r_mag: Float[Tensor, " d_sae"]
) -> tuple[Float[Tensor, " d_sae"], Float[Tensor, " d_sae"]]:
    """A gated encoder as one with thresholds, exactly (Rajamanoharan et al. 2024a, sec. 3.2).

    gate = u + b_gate and magnitude = exp(r_mag) u + b_mag are of the same u = W_enc x, so that

        magnitude = scale * gate + threshold,   scale = exp(r_mag),   threshold = b_mag - scale * b_gate

    and the gate is open where the magnitude exceeds the threshold.

    Returns:
        What multiplies the encoder, and the threshold, which is negative where the gate opens before the magnitude is
        positive.
    """
    scale = r_mag.exp()
    return scale, b_mag - scale * b_gate


class Gated(Dense):
    """The architecture, in which b_enc is the gate's bias:

        z = W_enc (x - b_dec) + b_enc
        m = exp(r_mag) W_enc (x - b_dec) + b_mag
        f = relu(m) where z > 0, else 0
        x_hat = W_dec f + b_dec,   |W_dec[i]| = 1
        x_gate = W_dec relu(z) + b_dec,   with W_dec and b_dec as constants
        loss = (mean |x - x_hat|^2 + l1_coefficient * mean of sum_i relu(z_i) + mean |x - x_gate|^2) / variance

    The step at z = 0 has no gradient, so the gate learns from the last two terms alone, and the penalty shrinks no
    activation. SAELens lets W_dec and b_dec learn from x_gate, too; the paper and dictionary_learning do not. r_mag
    and both biases start at 0, as there.
    """

    warm_up = 0.05  # as ReLU's

    def start(self, weights: Weights) -> Weights:
        """Weights with magnitudes equal to the gate's pre-activations."""
        b_mag, r_mag = torch.zeros_like(weights.b_enc), torch.zeros_like(weights.b_enc)
        return replace(super().start(weights), b_mag=b_mag, r_mag=r_mag)

    def encoder(self, weights: Weights) -> tuple[Float32[Tensor, "d_sae d_model"], Float32[Tensor, " d_sae"]]:
        """The encoder of the magnitudes."""
        b_mag, r_mag = _magnitudes(weights)
        return weights.W_enc * r_mag.exp()[:, None], b_mag

    def thresholds(self, weights: Weights) -> Float32[Tensor, " d_sae"]:
        """Where the gate opens, in units of the magnitudes."""
        return as_threshold(weights.b_enc, *_magnitudes(weights))[1].clamp(min=0)

    def acts(self, weights: Weights, z: Float[Tensor, "rows d_sae"]) -> Float[Tensor, "rows d_sae"]:
        """As `Dense.acts`."""
        scale, threshold = map(low_precision, as_threshold(weights.b_enc, *_magnitudes(weights)))
        return torch.addcmul(threshold, z, scale).relu_().mul_(z > 0)

    def pull_back(self, learner: Learner, block: Block) -> tuple[Float[Tensor, "rows d_sae"], Float32[Tensor, ""]]:
        """As `Dense.pull_back`: what the magnitudes learn, and the gate."""
        b_mag, r_mag = _magnitudes(learner.weights)
        of_b_mag, of_r_mag = _magnitudes(learner.gradients)
        d_m = block.d_f.mul_(block.active)
        summed = d_m.sum(0, dtype=torch.float32)
        of_b_mag.add_(summed)
        of_r_mag.add_((d_m * block.f).sum(0, dtype=torch.float32) - summed * b_mag)  # exp(r_mag) u = m - b_mag
        gate = block.z.relu()
        missed = (gate @ block.W_dec).float() - block.centered
        d_gate = low_precision(missed * (2 * block.scale)) @ block.W_dec.T
        d_z = d_gate.add_(block.penalty).mul_(gate > 0).add_(d_m.mul_(low_precision(r_mag.exp())))
        return d_z, gate.sum(dtype=torch.float32)

    def step(
        self, learner: Learner, x: Float32[Tensor, "batch d_model"], dead: Bool[Tensor, " d_sae"], progress: float
    ) -> Step:
        """As `Architecture.step`. b_enc has no part in the magnitudes, only in z, through which they are computed."""
        taken = super().step(learner, x, dead, progress)
        of_b_mag, _ = _magnitudes(learner.gradients)
        r_mag = _magnitudes(learner.weights)[1]
        learner.gradients.b_enc.sub_(of_b_mag * low_precision(r_mag.exp()))
        return taken


def _magnitudes(weights: Weights) -> tuple[Float32[Tensor, " d_sae"], Float32[Tensor, " d_sae"]]:
    """b_mag and r_mag, of the weights or of their gradients."""
    assert weights.b_mag is not None, "`start` made them"
    assert weights.r_mag is not None, "`start` made them"
    return weights.b_mag, weights.r_mag
