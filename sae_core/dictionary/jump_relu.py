"""JumpReLU (Rajamanoharan et al. 2024b): a threshold for each feature, learned, held at a wanted L0."""

from dataclasses import replace
from statistics import NormalDist

import torch
from jaxtyping import Bool, Float32
from torch import Tensor

from sae_core.dictionary.architecture import Architecture, Step, b_dec_gradient, candidates, sparse_gradients
from sae_core.dictionary.aux_k import add_aux_k
from sae_core.dictionary.folded import MARGIN
from sae_core.dictionary.sparse import Groups, reconstruct, sums
from sae_core.dictionary.weights import Learner, Weights

BANDWIDTH = 0.05
"""Width of the window around a threshold in which it has a gradient (SAELens's default, for inputs of this scale)."""
SPARSITY = 1.0
"""Weight of the penalty beside the fraction of variance unexplained (dictionary_learning)."""
START = 1 / 3
"""Length of the encoder's rows at the start.

At full length the first reconstructions are too long, because features that fire together point in like directions;
what is learned from that switches many off for good. On planted data of uneven variance (96 dimensions, 768 features,
k 16, 300,000 tokens) 6% of the features end dead and not 33%, and FVU is 0.048 and not 0.074.
"""


class JumpReLU(Architecture):
    """The architecture

        z = W_enc (x - b_dec) + b_enc
        f = z H(z - threshold),   H the step function, threshold >= 0
        x_hat = W_dec f + b_dec,   |W_dec[i]| = 1
        loss = mean |x - x_hat|^2 / variance + SPARSITY * (mean L0 / k - 1)^2 + coefficient * AuxK

    The target L0 is the paper's appendix, as in dictionary_learning and Gemma Scope 2. Steps have no gradient, so one
    is made of the values near a threshold; it goes to the threshold alone:

        dH/dthreshold = -near / BANDWIDTH,   df/dthreshold = -threshold near / BANDWIDTH,
        near = 1 where |z - threshold| < BANDWIDTH / 2, else 0

    AuxK is no part of the published recipes, which see billions of tokens; without it twice as many features or more
    are dead after few. Thresholds start where random directions would have the wanted L0: z is then normal, of
    variance / d_model times the square of the encoder's length.
    """

    def __init__(self, k: int, aux_coefficient: float, variance: float) -> None:
        self.k, self.aux_coefficient, self.variance = k, aux_coefficient, variance

    def start(self, weights: Weights) -> Weights:
        """Weights with thresholds, and a shorter encoder."""
        d_sae, d_model = weights.W_enc.shape
        deviations = NormalDist().inv_cdf(max(0.5, 1 - self.k / d_sae))
        threshold = START * deviations * (self.variance / d_model) ** 0.5
        weights.W_enc.mul_(START)
        return replace(weights, threshold=torch.full_like(weights.b_enc, threshold))

    def thresholds(self, weights: Weights) -> Float32[Tensor, " d_sae"]:
        """The learned thresholds."""
        assert weights.threshold is not None, "`start` made them"
        return weights.threshold

    def step(
        self, learner: Learner, x: Float32[Tensor, "batch d_model"], dead: Bool[Tensor, " d_sae"], progress: float
    ) -> Step:
        """As `Architecture.step`."""
        weights, d_sae = learner.weights, len(dead)
        centered, threshold = x - weights.b_dec, self.thresholds(weights)
        slack = MARGIN * centered.square().mean().sqrt() * torch.linalg.vector_norm(weights.W_enc, dim=1)
        pairs, z = candidates(learner, centered, threshold - BANDWIDTH / 2 - slack)
        over = z - threshold[pairs.feature]
        active, near = over > 0, over.abs() < BANDWIDTH / 2
        value = z * active
        error, pull = reconstruct(pairs, value, weights.W_dec, centered)
        scale = 2 / (len(x) * self.variance)
        upstream, d_value = error * scale, pull * scale
        excess = int(active.sum()) / (len(x) * self.k) - 1
        d_active = SPARSITY * 2 * excess / (len(x) * self.k)
        sparse_gradients(learner, pairs, value, d_value * active, centered, upstream, pairs.row)
        d_threshold = -(threshold[pairs.feature] * d_value + d_active) * near / BANDWIDTH
        self.thresholds(learner.gradients).copy_(sums(d_threshold, Groups.by(pairs.feature, d_sae)))
        aux = add_aux_k(learner, centered, error, dead, self.aux_coefficient)
        b_dec_gradient(learner, upstream.sum(0))
        n_fired = torch.bincount(pairs.feature[active], minlength=d_sae)
        return Step(float(torch.linalg.vector_norm(error) ** 2), int(active.sum()), n_fired, aux)
