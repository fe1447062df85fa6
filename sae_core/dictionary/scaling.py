"""How raw activations become what is learned on, and how that is folded away again.

Activations of a site are multiplied by one number so that E|x|^2 = d_model (Templeton et al. 2024), which makes
learning rates comparable between sites.
"""

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from sae_core.dictionary.folded import Dictionary
from sae_core.dictionary.weights import Weights


class OneSite:
    """For what reconstructs its input: b_dec, which is learned, is taken from the encoder's input."""

    def __init__(self, mean: Float32[Tensor, " d_model"], mean_square: Float32[Tensor, " 1"]) -> None:
        self.scale = _scale(mean, mean_square[0])
        self.mean = mean * self.scale

    def apply(self, batch: Float32[Tensor, "batch d_model"]) -> Float32[Tensor, "batch d_model"]:
        """What the architecture learns on."""
        return batch * self.scale

    def wanted(self, x: Float32[Tensor, "batch d_model"]) -> Float32[Tensor, "batch d_model"]:
        """The part of it that is reconstructed."""
        return x

    def fold(
        self, W_enc: Float32[Tensor, "d_sae d_model"], b_enc: Float32[Tensor, " d_sae"], weights: Weights
    ) -> tuple[Float32[Tensor, "d_sae d_model"], Float32[Tensor, " d_sae"]]:
        """The encoder that reads raw activations, and gives activations in their units."""
        return W_enc, (b_enc - W_enc @ weights.b_dec) / self.scale

    def unfold(self, dictionary: Dictionary) -> Weights:
        """The weights that `fold` would make the dictionary of, copied."""
        W_enc, b_dec = dictionary.W_enc.T.clone(), dictionary.b_dec * self.scale
        return Weights(W_enc, dictionary.b_enc * self.scale + W_enc @ b_dec, dictionary.W_dec.clone(), b_dec)


class TwoSites:
    """For what reads one site and writes another; the encoder's input is centered at its mean, for good.

    Batches hold both, [batch, 2, d_model]; statistics a row each.
    """

    def __init__(self, mean: Float32[Tensor, "2 d_model"], mean_square: Float32[Tensor, " 2"]) -> None:
        self._read_scale, self.scale = (_scale(m, square) for m, square in zip(mean, mean_square, strict=True))
        self._read_mean, self.mean = mean[0] * self._read_scale, mean[1] * self.scale

    def apply(self, batch: Float32[Tensor, "batch 2 d_model"]) -> Float32[Tensor, "batch 2 d_model"]:
        """What the architecture learns on."""
        read, written = batch.unbind(1)
        return torch.stack([read * self._read_scale - self._read_mean.to(batch.device), written * self.scale], dim=1)

    def wanted(self, x: Float32[Tensor, "batch 2 d_model"]) -> Float32[Tensor, "batch d_model"]:
        """The part of it that is reconstructed."""
        return x[:, 1]

    def fold(
        self, W_enc: Float32[Tensor, "d_sae d_model"], b_enc: Float32[Tensor, " d_sae"], weights: Weights
    ) -> tuple[Float32[Tensor, "d_sae d_model"], Float32[Tensor, " d_sae"]]:
        """The encoder that reads raw activations of one site, and gives activations in the units of the other."""
        b_enc = b_enc - W_enc @ self._read_mean.to(W_enc.device)
        return W_enc * (self._read_scale / self.scale), b_enc / self.scale


def _scale(mean: Float32[Tensor, " d_model"], mean_square: Float[Tensor, ""]) -> float:
    return float((len(mean) / mean_square.double()).sqrt())
