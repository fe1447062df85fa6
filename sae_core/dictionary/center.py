"""The point that most of a cloud lies around, whatever a few far-off ones do: where a decoder's bias may start."""

import torch
from jaxtyping import Float32
from torch import Tensor

STEPS, ENOUGH = 100, 1e-6
"""Weiszfeld's steps at most, and the relative change at which to stop."""


def geometric_median(x: Float32[Tensor, "n d_model"]) -> Float32[Tensor, " d_model"]:
    """The point with the least sum of distances to the rows, by Weiszfeld's iteration from their mean.

    A row that the iteration meets exactly weighs as one that is very near, not infinitely much.
    """
    point = x.mean(0)
    nearest = torch.finfo(x.dtype).eps * torch.linalg.vector_norm(x, dim=1).mean().clamp(min=1e-30)
    for _ in range(STEPS):
        weight = 1 / torch.linalg.vector_norm(x - point, dim=1).clamp(min=nearest)
        before, point = point, (weight @ x) / weight.sum()
        if torch.linalg.vector_norm(point - before) <= ENOUGH * torch.linalg.vector_norm(point):
            break
    return point
