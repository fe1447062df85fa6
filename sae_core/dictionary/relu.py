"""ReLU with an L1 penalty: the recipe of "Scaling Monosemanticity" (Templeton et al. 2024; Anthropic, April 2024)."""

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from sae_core.dictionary.dense import Block, Dense
from sae_core.dictionary.weights import Learner, Weights


class ReLU(Dense):
    """The architecture

        z = W_enc (x - b_dec) + b_enc
        f = relu(z)
        x_hat = W_dec f + b_dec,   |W_dec[i]| = 1
        loss = (mean |x - x_hat|^2 + l1_coefficient * mean of sum_i f_i |W_dec[i]|) / variance

    The paper leaves decoder norms free and weighs each activation by its own in the penalty: nothing changes when
    norm moves from a decoder row to its activation, so that unit rows lose nothing and come out folded. What `Dense`
    gets by a shorter encoder, the paper gets by short decoder rows.
    """

    warm_up = 0.05  # Anthropic, April 2024

    def thresholds(self, weights: Weights) -> float:
        """0: whatever is positive is active."""
        return 0.0

    def acts(self, weights: Weights, z: Float[Tensor, "rows d_sae"]) -> Float[Tensor, "rows d_sae"]:
        """As `Dense.acts`, in place."""
        return z.relu_()

    def pull_back(self, learner: Learner, block: Block) -> tuple[Float[Tensor, "rows d_sae"], Float32[Tensor, ""]]:
        """As `Dense.pull_back`."""
        return block.d_f.add_(block.penalty).mul_(block.active), block.f.sum(dtype=torch.float32)
