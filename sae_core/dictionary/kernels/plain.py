"""The kernels in PyTorch: for every device, and the oracle of the others."""

import torch
from jaxtyping import Float, Float32, Int, Int32, Int64
from torch import Tensor
from torch.nn.functional import embedding_bag
from torch.optim.adam import adam as torch_adam

BETAS = (0.9, 0.999)  # Anthropic, April 2024; Adam's own defaults
EPSILON = 1e-8
NEAR = 1 / 16
"""How far below the k-th largest a value is still proposed, as a share of it: many times bfloat16's error."""


def places(block: Float[Tensor, "rows d_sae"], k: int | None) -> tuple[Int64[Tensor, " rows"], Int32[Tensor, " found"]]:
    """How many places each row has, and their columns, row by row.

    Args:
        block: pre-activations.
        k: without it, every positive entry is a place; with it, those only that are not clearly below the k-th
            largest of their row (none of the k largest is left out; others may come along).
    """
    above = block > 0
    if k is not None and k < block.shape[1]:
        above &= block > block.topk(k, dim=1).values[:, -1:] * (1 - NEAR)
    return above.sum(1), above.nonzero()[:, 1].int()


def order_by(key: Int[Tensor, " nnz"], n: int) -> tuple[Int64[Tensor, " nnz"], Int64[Tensor, " n_and_one"]]:
    """A stable order by key (from 0 to n - 1), and where each key's entries start in it, with the end at the end."""
    counts = torch.bincount(key, minlength=n)
    return key.argsort(stable=True), torch.cat([counts.new_zeros(1), counts.cumsum(0)])


def dots(
    a: Float32[Tensor, "m d"], i: Int[Tensor, " nnz"], b: Float32[Tensor, "n d"], j: Int[Tensor, " nnz"]
) -> Float32[Tensor, " nnz"]:
    """a[i] . b[j] for each pair.

    The gradient that `embedding_bag` passes to its weights is this very operation, without a [pairs, d] temporary;
    torch has no public name for it alone.
    """
    return torch.ops.aten._embedding_bag_per_sample_weights_backward(a, b, j, i.new_zeros(1), i, 0, -1)


def weighted_sums(
    table: Float32[Tensor, "n d"],
    index: Int[Tensor, " nnz"],
    weight: Float32[Tensor, " nnz"],
    starts: Int64[Tensor, " bags_and_one"],
    out: Float32[Tensor, "bags d"],
) -> Float32[Tensor, "bags d"]:
    """For each bag, the sum of weight * table[index] over its entries, into `out`; an empty bag gives zeros."""
    bags = embedding_bag(index.long(), table, starts, mode="sum", per_sample_weights=weight, include_last_offset=True)
    return out.copy_(bags)


def reconstruct(
    W_dec: Float32[Tensor, "d_sae d_model"],
    feature: Int32[Tensor, " nnz"],
    value: Float32[Tensor, " nnz"],
    starts: Int64[Tensor, " rows_and_one"],
    target: Float32[Tensor, "rows d_model"],
) -> tuple[Float32[Tensor, "rows d_model"], Float32[Tensor, " nnz"]]:
    """error = (sum of value * W_dec[feature] over each row's entries) - target, and error[row] . W_dec[feature]."""
    error = weighted_sums(W_dec, feature, value, starts, torch.empty_like(target)).sub_(target)
    row = torch.arange(len(target), device=value.device).repeat_interleave(starts.diff())
    return error, dots(W_dec, feature.long(), error, row)


def largest_of_rows(
    z: Float32[Tensor, " nnz"], starts: Int64[Tensor, " rows_and_one"], k: int
) -> Int64[Tensor, " kept"]:
    """Places, in order, of the positive values that are among the k largest of their row.

    Args:
        z: values, row after row.
        starts: where each row starts, with the end at the end.
        k: of equal values at the end, any are taken.
    """
    counts = starts.diff()
    row = torch.arange(len(counts), device=z.device).repeat_interleave(counts)
    width = max(int(counts.max()), k) if len(counts) else k
    place = row * width + torch.arange(len(z), device=z.device) - starts[row]
    table = z.new_full((len(counts) * width,), -torch.inf).index_put_((place,), z).view(-1, width)
    largest = torch.zeros_like(table, dtype=torch.bool).scatter_(1, table.topk(k, dim=1).indices, True)
    return (largest.view(-1)[place] & (z > 0)).nonzero().squeeze(1)


def kth_largest(values: Float32[Tensor, " n"], k: int) -> float:
    """The value that ranks k-th from above, counted from 1."""
    return float(values.kthvalue(len(values) - k + 1).values)


def remove_parallel(gradient: Float32[Tensor, "n d"], rows: Float32[Tensor, "n d"]) -> None:
    """Take from each row of the gradient its part along the (unit) row of weights, in place."""
    gradient.addcmul_(torch.linalg.vecdot(gradient, rows).unsqueeze(1), rows, value=-1)


def adam(
    weight: Float32[Tensor, "*shape"],
    gradient: Float32[Tensor, "*shape"],
    mean: Float32[Tensor, "*shape"],
    square: Float32[Tensor, "*shape"],
    step: int,
    lr: float,
    scale: float,
    unit_rows: bool,
) -> None:
    """One step of Adam (Kingma and Ba 2015), the `step`-th counted from 0, in place.

    Args:
        weight: what is learned.
        gradient: of the loss.
        mean, square: Adam's moments.
        step: steps taken before this one.
        lr: learning rate.
        scale: what the gradient is multiplied by first.
        unit_rows: bring the rows back to unit norm afterwards.
    """
    torch_adam(
        [weight], [gradient], [mean], [square], [], [torch.tensor(float(step), device=weight.device)],
        fused=True, grad_scale=torch.tensor(1 / scale, device=weight.device), amsgrad=False, maximize=False,
        weight_decay=0.0, beta1=BETAS[0], beta2=BETAS[1], eps=EPSILON, lr=lr,
    )  # fmt: skip
    if unit_rows:
        weight.div_(torch.linalg.vector_norm(weight, dim=1, keepdim=True))
