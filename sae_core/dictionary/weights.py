"""What is learned: the weights of one dictionary in training, their gradients, and Adam on them."""

from dataclasses import dataclass, fields

import torch
from jaxtyping import Float, Float32
from torch import Tensor

from sae_core.dictionary.kernels import kernels
from sae_core.dictionary.sparse import low_precision

MAX_NORM = 1.0
"""Gradients of a larger norm, over all weights together, are scaled down to it (Anthropic, April 2024)."""


@dataclass(frozen=True)
class Weights:
    """The weights, or anything of their shapes: gradients, Adam's moments.

    W_enc lies here as [d_sae, d_model], a feature a row like W_dec, because every kernel reads it so.
    """

    W_enc: Float32[Tensor, "d_sae d_model"]
    b_enc: Float32[Tensor, " d_sae"]
    W_dec: Float32[Tensor, "d_sae d_model"]
    b_dec: Float32[Tensor, " d_model"]
    threshold: Float32[Tensor, " d_sae"] | None = None
    """Only of architectures that learn it."""
    b_mag: Float32[Tensor, " d_sae"] | None = None
    """Bias of the magnitudes of `gated`."""
    r_mag: Float32[Tensor, " d_sae"] | None = None
    """Logarithm of what multiplies the encoder for the magnitudes of `gated`."""

    @classmethod
    def initial(cls, d_sae: int, b_dec: Float32[Tensor, " d_model"], seed: int) -> "Weights":
        """Unit decoder rows in random directions, the encoder equal to the decoder, no encoder bias.

        Drawn on the CPU, so that every device starts from the same bits.
        """
        draw = torch.randn(d_sae, len(b_dec), generator=torch.Generator().manual_seed(seed))
        W_dec = (draw / draw.norm(dim=1, keepdim=True)).to(b_dec.device)
        return cls(W_dec.clone(), torch.zeros(d_sae, device=b_dec.device), W_dec, b_dec.clone())

    def zeros(self) -> "Weights":
        """Zeros of the same shapes."""
        return Weights(**{name: torch.zeros_like(tensor) for name, tensor in self._named().items()})

    def zero_(self) -> "Weights":
        """These, set to zero."""
        for tensor in self.tensors():
            tensor.zero_()
        return self

    def tensors(self) -> list[Tensor]:
        """All that there are, in the order of the fields."""
        return list(self._named().values())

    def state(self, prefix: str) -> dict[str, Tensor]:
        """The tensors by name, for a checkpoint."""
        return {f"{prefix}.{name}": tensor for name, tensor in self._named().items()}

    @classmethod
    def from_state(cls, state: dict[str, Tensor], prefix: str) -> "Weights":
        """What `state` gave."""
        names = (field.name for field in fields(cls))
        return cls(**{name: state[f"{prefix}.{name}"] for name in names if f"{prefix}.{name}" in state})

    def _named(self) -> dict[str, Tensor]:
        named = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


class Learner:
    """Weights with their Adam moments, and what holds after every step: unit decoder rows, no negative threshold."""

    def __init__(self, weights: Weights, mean: Weights | None = None, square: Weights | None = None) -> None:
        self.weights = weights
        self.mean, self.square = mean or weights.zeros(), square or weights.zeros()
        self.W_enc_low: Float[Tensor, "d_sae d_model"] = low_precision(weights.W_enc)
        """W_enc in the arithmetic of the encoder product, kept up to date."""
        self.gradients = weights.zeros()
        """Of the last batch; written over by the next."""

    def update(self, step: int, lr: float) -> float:
        """One step of Adam, the `step`-th counted from 0, in place; returns the norm of the gradients before clipping.

        The decoder's gradient loses its part along each row, which only the norm constraint would undo.
        """
        device_kernels = kernels(self.weights.W_dec.device)
        device_kernels.remove_parallel(self.gradients.W_dec, self.weights.W_dec)
        norm = float(torch.nn.utils.get_total_norm(self.gradients.tensors()))
        scale = MAX_NORM / max(norm, MAX_NORM)
        of_each = (x.tensors() for x in (self.weights, self.gradients, self.mean, self.square))
        for weight, gradient, mean, square in zip(*of_each, strict=True):
            unit_rows = weight is self.weights.W_dec
            device_kernels.adam(weight, gradient, mean, square, step, lr, scale, unit_rows)
        self.W_enc_low.copy_(self.weights.W_enc)
        if self.weights.threshold is not None:
            self.weights.threshold.clamp_(min=0)
        return norm

    def state(self) -> dict[str, Tensor]:
        """Everything that the next step depends on."""
        return self.weights.state("weights") | self.mean.state("adam_mean") | self.square.state("adam_square")

    @classmethod
    def from_state(cls, state: dict[str, Tensor]) -> "Learner":
        """What `state` gave."""
        return cls(*(Weights.from_state(state, prefix) for prefix in ("weights", "adam_mean", "adam_square")))
