"""The four operations that a sparse step is made of. After the encoder product nothing is d_sae wide.

    propose        which (row, feature) pairs may fire: the one full product, in bfloat16 where the machine has it
    dots           a_i . b_j for given pairs (i, j): exact pre-activations, and the gradient of the activations
    weighted_sums  sum of weight * table[index] over each bag: decoding, and the gradients of both matrices
    sums           sum of values over each feature: the gradient of b_enc

Gradients are sums over the pairs of one feature, so pairs are kept in feature order; no [pairs, d_model] array is
ever made. Both of `propose`'s outputs and all sums run in a fixed order: the same input gives the same bits.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Float32, Int, Int32, Int64
from torch import Tensor
from torch.nn.functional import embedding_bag, linear

BLOCK_BYTES = 32 << 20
"""Most memory that a block of the encoder product takes; the batch is cut into as many blocks as that needs."""


@dataclass(frozen=True)
class SparseActs:
    """Feature activations of some tokens: one entry for each feature that fires, in row order."""

    row: Int64[Tensor, " nnz"]
    """Which token, counted from 0."""
    feature: Int64[Tensor, " nnz"]
    value: Float32[Tensor, " nnz"]
    n_rows: int
    """Number of tokens, those on which nothing fires included."""


class Pairs(NamedTuple):
    """Places of a [rows, d_sae] matrix that may be other than zero, sorted by feature, then row."""

    row: Int32[Tensor, " nnz"]
    feature: Int32[Tensor, " nnz"]

    def at(self, where: Tensor) -> "Pairs":
        """The pairs at the given places or under the given mask."""
        return Pairs(self.row[where], self.feature[where])


def encoder_dtype(device: torch.device) -> torch.dtype:
    """Arithmetic of the encoder product: bfloat16 where the hardware multiplies it faster than float32."""
    fast = torch.cpu.get_capabilities().get("avx512_bf16", False) if device.type == "cpu" else True
    return torch.bfloat16 if fast else torch.float32


def propose(
    x: Float[Tensor, "rows d_model"], weight: Float[Tensor, "d_sae d_model"], bias: Float[Tensor, " d_sae"]
) -> Pairs:
    """The pairs with x . weight + bias > 0, computed in the (low) precision of the arguments.

    Args:
        x: inputs, of `weight`'s dtype.
        weight: encoder directions as rows; the product is three times slower on a CPU the other way around.
        bias: the encoder's bias less the limit to be exceeded.
    """
    rows = max(1, BLOCK_BYTES // (weight.shape[0] * weight.element_size()))
    found = [_positive(linear(block, weight, bias)) + i * rows * len(weight) for i, block in enumerate(x.split(rows))]
    flat = torch.cat(found)
    row, feature = (flat // len(weight)).int(), (flat % len(weight)).int()
    order = feature.argsort(stable=True)
    return Pairs(row[order], feature[order])


def _positive(block: Float[Tensor, "rows d_sae"]) -> Int64[Tensor, " found"]:
    """Flat places of the positive entries, in order."""
    if block.device.type != "cpu":
        return (block > 0).view(-1).nonzero().squeeze(1)
    # numpy's scan for set bytes is several times faster than torch's; a positive float is a positive integer too
    bits = block.view(torch.int16 if block.dtype == torch.bfloat16 else torch.int32)
    return torch.from_numpy(np.flatnonzero(bits.numpy() > 0))


def dots(
    a: Float32[Tensor, "m d"], i: Int[Tensor, " nnz"], b: Float32[Tensor, "n d"], j: Int[Tensor, " nnz"]
) -> Float32[Tensor, " nnz"]:
    """a[i] . b[j] for each pair; fastest when `i` is sorted.

    The gradient that `embedding_bag` passes to its weights is this very operation, threaded and without a
    [pairs, d] temporary; torch has no public name for it alone.
    """
    starts = i.new_zeros(1)
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(a, b, j, starts, i, 0, -1)


def weighted_sums(
    table: Float32[Tensor, "n d"],
    index: Int[Tensor, " nnz"],
    weight: Float32[Tensor, " nnz"],
    bag: Int[Tensor, " nnz"],
    n_bags: int,
) -> Float32[Tensor, "n_bags d"]:
    """For each bag, the sum of weight * table[index] over its entries; `bag` is sorted, an empty bag gives zeros."""
    ends = torch.arange(n_bags + 1, device=bag.device, dtype=bag.dtype)
    starts = torch.searchsorted(bag, ends, out_int32=bag.dtype == torch.int32)
    return embedding_bag(index, table, starts, mode="sum", per_sample_weights=weight, include_last_offset=True)


def sums(value: Float32[Tensor, " nnz"], feature: Int[Tensor, " nnz"], d_sae: int) -> Float32[Tensor, " d_sae"]:
    """For each feature, the sum of its values."""
    return torch.bincount(feature, weights=value, minlength=d_sae).float()


def decode(
    pairs: Pairs, value: Float32[Tensor, " nnz"], W_dec: Float32[Tensor, "d_sae d_model"], n_rows: int
) -> Float32[Tensor, "n_rows d_model"]:
    """Sum of value * W_dec[feature] for each row."""
    order = pairs.row.argsort(stable=True)
    return weighted_sums(W_dec, pairs.feature[order], value[order], pairs.row[order], n_rows)


def low_precision(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """A copy in the encoder product's arithmetic."""
    return x.to(encoder_dtype(x.device))
