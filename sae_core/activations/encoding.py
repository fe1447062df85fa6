"""How a shard keeps its activations: as floats of some type, or as bytes with a scale for each row."""

from collections.abc import Mapping

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sae_core.errors import MindAtlasError

Rows = Tensor | slice
"""Which rows of a shard: their numbers, a mark for each, or a slice."""
EVERY = slice(None)
COLUMNS = ("acts", "scale", "center")
"""What `encode` may write."""
_LARGEST = 127
_CHUNK = 1024
"""Rows decoded at a time: few enough to stay in a core's cache."""


class ActivationError(MindAtlasError):
    """Activations that cannot be made, or cannot be read."""


def encode(acts: Float[Tensor, "tokens d_model"], is_sink: Bool[Tensor, " tokens"], kept_as: str) -> dict[str, Tensor]:
    """The columns that keep the activations: `acts`, and of `int8` also `scale` and `center`.

    A row of `int8` is (row - center) / scale, rounded; center is the mean of the shard's rows, sinks left out, and the
    scale takes the row's largest value to 127. The mean matters: a few dimensions are far from 0 on every token, and
    without it they alone would set the scale (at layer 15 of SmolLM2-135M the error is six times as large).

    Raises:
        ActivationError: a value is larger than `float16` holds.
    """
    if kept_as != "int8":
        kept = acts.to(getattr(torch, kept_as))
        if kept_as == "float16" and not kept.isfinite().all():
            raise ActivationError(
                f"an activation of {float(acts.abs().max()):.3g} is more than float16 holds (65504): "
                'set activations.kept_as = "bfloat16"'
            )
        return {"acts": kept}
    chunks, kept = acts.split(_CHUNK), (~is_sink).split(_CHUNK)
    total = torch.stack([some[keep].double().sum(0) for some, keep in zip(chunks, kept, strict=True)]).sum(0)
    center = (total / max(1, int((~is_sink).sum()))).float()
    scale = torch.cat([(some.float() - center).abs().amax(1) for some in chunks]) / _LARGEST
    scale[scale == 0] = 1
    small = torch.empty(acts.shape, dtype=torch.int8)
    for some, by, out in zip(chunks, scale[:, None].split(_CHUNK), small.split(_CHUNK), strict=True):
        out.copy_((some.float() - center).div_(by).round_())
    return {"acts": small, "scale": scale, "center": center}


def decode(columns: Mapping[str, Tensor], rows: Rows = EVERY) -> Float[Tensor, "rows d_model"]:
    """The activations in the given rows; those kept as `int8` in bfloat16, whose rounding is finer than theirs."""
    acts = columns["acts"][rows]
    if "scale" not in columns:
        return acts
    decoded = torch.empty(acts.shape, dtype=torch.bfloat16)
    parts = acts.split(_CHUNK), columns["scale"][rows, None].split(_CHUNK), decoded.split(_CHUNK)
    for some, scale, out in zip(*parts, strict=True):
        out.copy_((some * scale).add_(columns["center"]))
    return decoded


def row_bytes(kept_as: str, d_model: int) -> int:
    """Bytes that a row takes on disk."""
    return d_model + 4 if kept_as == "int8" else d_model * getattr(torch, kept_as).itemsize
