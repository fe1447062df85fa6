"""Sparse activations, and what a step on them is made of. After the encoder product nothing is d_sae wide.

    propose     which (row, feature) pairs may fire: the one full product, in bfloat16 where the machine has it
    dots        exact pre-activations of given pairs, and the gradient of the activations
    reconstruct what a sparse reconstruction gets wrong, and how much each pair is to blame
    group_sums  the gradients of both matrices

No [pairs, d_model] array is ever made.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Float, Float32, Int, Int32, Int64
from torch import Tensor
from torch.nn.functional import linear

from sae_core.dictionary.kernels import kernels

BLOCK_BYTES = {"cpu": 8 << 20, "cuda": 512 << 20}
"""Most memory that a block of the encoder product takes, by kind of device; a batch is cut into as many as that needs.

On a CPU a block stays in the cache until it was looked through; on a GPU each one waits for the one before.
"""


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
    """Places of a [rows, d_sae] matrix that may be other than zero, sorted by row, then feature."""

    row: Int32[Tensor, " nnz"]
    feature: Int32[Tensor, " nnz"]

    def at(self, where: Tensor) -> "Pairs":
        """The pairs at the given places or under the given mask."""
        return Pairs(self.row[where], self.feature[where])

    def starts(self, n_rows: int) -> Int64[Tensor, " rows_and_one"]:
        """Where each row's pairs start, with the end at the end."""
        ends = torch.arange(n_rows + 1, dtype=self.row.dtype, device=self.row.device)
        return torch.searchsorted(self.row, ends)

    def largest(self, z: Float32[Tensor, " nnz"], n_rows: int, k: int) -> Int64[Tensor, " kept"]:
        """Places, in order, of the positive values among the k largest of their row."""
        return kernels(z.device).largest_of_rows(z, self.starts(n_rows), k)


class Groups(NamedTuple):
    """Pairs in groups: those of a feature, or of a row."""

    order: Int64[Tensor, " nnz"]
    """The pairs' places, group by group, in a group in their own order."""
    starts: Int64[Tensor, " groups_and_one"]
    """Where each group starts in `order`, with the end at the end."""

    @classmethod
    def by(cls, key: Int[Tensor, " nnz"], n: int) -> "Groups":
        """The pairs of each key from 0 to n - 1."""
        return cls(*kernels(key.device).order_by(key, n))


def encoder_dtype(device: torch.device) -> torch.dtype:
    """Arithmetic of the encoder product: bfloat16 where the hardware multiplies it faster than float32."""
    fast = torch.cpu.get_capabilities().get("avx512_bf16", False) if device.type == "cpu" else True
    return torch.bfloat16 if fast else torch.float32


def low_precision(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """A copy in the encoder product's arithmetic."""
    return x.to(encoder_dtype(x.device))


def rows_of_block(weight: Float[Tensor, "d_sae d_model"]) -> int:
    """How many rows of inputs are multiplied by the weights at a time."""
    return max(1, BLOCK_BYTES[weight.device.type] // (len(weight) * weight.element_size()))


def propose(
    x: Float[Tensor, "rows d_model"],
    weight: Float[Tensor, "d_sae d_model"],
    bias: Float[Tensor, " d_sae"],
    k: int | None = None,
) -> Pairs:
    """The pairs with x . weight + bias > 0, computed in the (low) precision of the arguments.

    Args:
        x: inputs, of `weight`'s dtype.
        weight: encoder directions as rows; the product is three times slower on a CPU the other way around.
        bias: the encoder's bias less the limit to be exceeded.
        k: propose only what may be among the k largest of its row.
    """
    rows = rows_of_block(weight)
    places = kernels(x.device).places
    counts, features = zip(*(places(linear(block, weight, bias), k) for block in x.split(rows)), strict=True)
    row = torch.arange(len(x), dtype=torch.int32, device=x.device).repeat_interleave(torch.cat(counts))
    return Pairs(row, torch.cat(features))


def dots(
    a: Float32[Tensor, "m d"], i: Int[Tensor, " nnz"], b: Float32[Tensor, "n d"], j: Int[Tensor, " nnz"]
) -> Float32[Tensor, " nnz"]:
    """a[i] . b[j] for each pair."""
    return kernels(a.device).dots(a, i, b, j)


def reconstruct(
    pairs: Pairs,
    value: Float32[Tensor, " nnz"],
    W_dec: Float32[Tensor, "d_sae d_model"],
    target: Float32[Tensor, "rows d_model"],
) -> tuple[Float32[Tensor, "rows d_model"], Float32[Tensor, " nnz"]]:
    """error = decoded - target, and error[row] . W_dec[feature] for each pair: how much each is to blame."""
    return kernels(value.device).reconstruct(W_dec, pairs.feature, value, pairs.starts(len(target)), target)


def group_sums(
    table: Float32[Tensor, "n d"],
    index: Int[Tensor, " nnz"],
    weight: Float32[Tensor, " nnz"],
    groups: Groups,
    out: Float32[Tensor, "groups d"],
) -> Float32[Tensor, "groups d"]:
    """For each group, the sum of weight * table[index] over its pairs, into `out`."""
    order, starts = groups
    return kernels(table.device).weighted_sums(table, index[order], weight[order], starts, out)


def sums(value: Float32[Tensor, " nnz"], groups: Groups) -> Float32[Tensor, " groups"]:
    """For each group, the sum of its pairs' values."""
    return torch.segment_reduce(value[groups.order], "sum", offsets=groups.starts, initial=0.0)


def kth_largest(values: Float32[Tensor, " n"], k: int) -> float:
    """The value that ranks k-th from above; minus infinity when there are fewer."""
    return kernels(values.device).kth_largest(values, k) if len(values) >= k else -torch.inf
