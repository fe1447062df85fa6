"""AuxK: what dead features would have to learn to be of use (Gao et al. 2024, A.2).

The k_aux = d_model / 2 dead features that come closest to firing on a token reconstruct, together, what the living
left over; the loss of that is small beside the main one, and pulls the dead ones back to the data.
"""

import torch
from jaxtyping import Bool, Float, Float32
from torch import Tensor
from torch.nn.functional import linear

from sae_core.dictionary.sparse import low_precision, rows_of_block
from sae_core.dictionary.weights import Learner


def add_aux_k(
    learner: Learner,
    read: Float32[Tensor, "batch d_model"],
    error: Float32[Tensor, "batch d_model"],
    dead: Bool[Tensor, " d_sae"],
    coefficient: float,
) -> float:
    """Add the gradients of the auxiliary loss to the learner's; returns the loss, before its coefficient.

        e = x - x_hat = -error, a constant;  e_hat = sum of relu(z_i) W_dec[i] over the chosen dead i, without b_dec
        loss = min(n_dead / k_aux, 1) * sum |e - e_hat|^2 / sum |e - mean of e|^2

    The factor for few dead features is from sparsify; without it a handful would be asked to explain everything.
    Products are dense over the dead features, in the encoder's arithmetic, a block of rows at a time.
    """
    places = dead.nonzero().squeeze(1)
    if not len(places) or not coefficient:
        return 0.0
    gradients, residual = learner.gradients, -error
    k_aux = max(1, read.shape[1] // 2)
    share = min(len(places) / k_aux, 1.0)
    scale = share / (residual - residual.mean(0)).square().sum().clamp(min=torch.finfo(torch.float32).tiny)
    low = _Dead(learner, places)
    rows = rows_of_block(low.W_enc)
    loss = torch.zeros((), device=residual.device)
    for block, target in zip(read.split(rows), residual.split(rows), strict=True):
        block_low = low_precision(block)
        acts = low.acts(block_low, min(k_aux, len(places)))
        missed = (acts @ low.W_dec).float() - target
        loss += scale * missed.square().sum()
        upstream = low_precision(missed * (2 * coefficient * scale))
        d_acts = (upstream @ low.W_dec.T) * (acts > 0)
        gradients.W_dec.index_add_(0, places, (acts.T @ upstream).float())
        gradients.W_enc.index_add_(0, places, (d_acts.T @ block_low).float())
        gradients.b_enc.index_add_(0, places, d_acts.sum(0, dtype=torch.float32))
    return float(loss)


class _Dead:
    """The dead features' weights, in the encoder's arithmetic."""

    def __init__(self, learner: Learner, places: Tensor) -> None:
        self.W_enc = learner.W_enc_low[places]
        self.b_enc = low_precision(learner.weights.b_enc[places])
        self.W_dec = low_precision(learner.weights.W_dec[places])

    def acts(self, x: Float[Tensor, "batch d_model"], k: int) -> Float[Tensor, "batch n_dead"]:
        """The k largest pre-activations of each row where they are positive, zeros elsewhere."""
        z = linear(x, self.W_enc, self.b_enc)
        if k < z.shape[1]:
            top = z.topk(k, dim=1)
            z = torch.zeros_like(z).scatter_(1, top.indices, top.values)
        return z.relu_()
