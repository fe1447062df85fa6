"""The kernels for CUDA, in Triton.

Every sum belongs to one program, which adds in a fixed order: there are no atomics, and no tuning at run time, since
the winner would decide the bits. Where a whole row is needed at once, a program holds it as one block, its width
rounded up to a power of two and masked; where rows are gathered, it takes tiles of `PAIRS` by `COLUMNS`. Finding,
ordering and ranking are left to PyTorch, whose sorts and selections on CUDA are as good as any.
"""

from typing import Any, no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float32, Int, Int32, Int64
from torch import Tensor

from sae_core.dictionary.kernels import plain
from sae_core.dictionary.kernels.plain import BETAS, EPSILON

PAIRS, COLUMNS = 16, 128
"""A tile: 16 numbers for each thread of the four warps that a program has unless told otherwise."""
ENTRIES = 1024
"""Of a tensor without rows, for one program."""


@triton.jit
@no_type_check
def _dots(a, i, b, j, out, n, d, PAIRS: tl.constexpr, COLUMNS: tl.constexpr):
    """One program for PAIRS pairs."""
    pair = tl.program_id(0) * PAIRS + tl.arange(0, PAIRS)
    there = pair < n
    u = a + tl.load(i + pair, there, other=0).to(tl.int64)[:, None] * d
    v = b + tl.load(j + pair, there, other=0).to(tl.int64)[:, None] * d
    total = tl.zeros([PAIRS, COLUMNS], tl.float32)
    for start in range(0, d, COLUMNS):
        column = start + tl.arange(0, COLUMNS)[None, :]
        inside = there[:, None] & (column < d)
        total += tl.load(u + column, inside, other=0.0) * tl.load(v + column, inside, other=0.0)
    tl.store(out + pair, tl.sum(total, axis=1), there)


@triton.jit
@no_type_check
def _weighted_sums(table, index, weight, starts, out, d, PAIRS: tl.constexpr, COLUMNS: tl.constexpr):
    """One program for COLUMNS columns of a bag: a feature that fires everywhere is shared by d / COLUMNS programs."""
    bag = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    end = tl.load(starts + bag + 1)
    total = tl.zeros([PAIRS, COLUMNS], tl.float32)
    for first in range(tl.load(starts + bag), end, PAIRS):
        entry = first + tl.arange(0, PAIRS)
        there = entry < end
        row = table + tl.load(index + entry, there, other=0).to(tl.int64)[:, None] * d
        factor = tl.load(weight + entry, there, other=0.0)[:, None]
        total += factor * tl.load(row + column, there[:, None] & (column < d), other=0.0)
    tl.store(out + bag * d + column, tl.sum(total, axis=0)[None, :], column < d)


@triton.jit
@no_type_check
def _reconstruct(W_dec, feature, value, starts, target, error, pull, d, BLOCK: tl.constexpr):
    """One program for a row: its error stays in registers between decoding and the pulls."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    inside = column < d
    first, end = tl.load(starts + row), tl.load(starts + row + 1)
    here = -tl.load(target + row * d + column, inside, other=0.0)
    for n in range(first, end):
        direction = W_dec + tl.load(feature + n).to(tl.int64) * d
        here += tl.load(value + n) * tl.load(direction + column, inside, other=0.0)
    tl.store(error + row * d + column, here, inside)
    for n in range(first, end):
        direction = W_dec + tl.load(feature + n).to(tl.int64) * d
        tl.store(pull + n, tl.sum(here * tl.load(direction + column, inside, other=0.0), axis=0))


@triton.jit
@no_type_check
def _remove_parallel(gradient, rows, d, BLOCK: tl.constexpr):
    """One program for a row."""
    column = tl.arange(0, BLOCK)
    inside = column < d
    at = tl.program_id(0).to(tl.int64) * d + column
    g, row = tl.load(gradient + at, inside, other=0.0), tl.load(rows + at, inside, other=0.0)
    tl.store(gradient + at, g - tl.sum(g * row, axis=0) * row, inside)


@triton.jit
@no_type_check
def _adam(
    weight, gradient, mean, square, size, width, scale, rate, root,
    BETA1: tl.constexpr, BETA2: tl.constexpr, EPSILON: tl.constexpr, UNIT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program for `width` entries: a row where it is to have unit norm, any stretch otherwise."""
    column = tl.arange(0, BLOCK)
    at = tl.program_id(0).to(tl.int64) * width + column
    inside = (column < width) & (at < size)
    slope = scale * tl.load(gradient + at, inside, other=0.0)
    m, s = tl.load(mean + at, inside, other=0.0), tl.load(square + at, inside, other=0.0)
    m += (1 - BETA1) * (slope - m)
    s = BETA2 * s + (1 - BETA2) * slope * slope
    w = tl.load(weight + at, inside, other=0.0) - rate * m / (tl.sqrt(s) * root + EPSILON)
    if UNIT:
        w /= tl.sqrt(tl.sum(w * w, axis=0))  # beyond the mask w is 0: there nothing was loaded, and m is 0
    tl.store(mean + at, m, inside)
    tl.store(square + at, s, inside)
    tl.store(weight + at, w, inside)


places, largest_of_rows = plain.places, plain.largest_of_rows
"""PyTorch's own: `topk` selects by radix, and how many places there are has to come back from the GPU either way."""


def order_by(key: Int[Tensor, " nnz"], n: int) -> tuple[Int64[Tensor, " nnz"], Int64[Tensor, " n_and_one"]]:
    """As `plain.order_by`, but the starts come from the sorted keys: counting them would wait for the GPU."""
    ordered, order = key.sort(stable=True)
    return order, torch.searchsorted(ordered, torch.arange(n + 1, dtype=key.dtype, device=key.device))


def dots(
    a: Float32[Tensor, "m d"], i: Int[Tensor, " nnz"], b: Float32[Tensor, "n d"], j: Int[Tensor, " nnz"]
) -> Float32[Tensor, " nnz"]:
    """As `plain.dots`."""
    n, d = len(i), a.shape[1]
    out = a.new_empty(n)
    tensors = (tensor.contiguous() for tensor in (a, i, b, j))
    _launch(_dots, (triton.cdiv(n, PAIRS),), *tensors, out, n, d, PAIRS=PAIRS, COLUMNS=COLUMNS)
    return out


def weighted_sums(
    table: Float32[Tensor, "n d"],
    index: Int[Tensor, " nnz"],
    weight: Float32[Tensor, " nnz"],
    starts: Int64[Tensor, " bags_and_one"],
    out: Float32[Tensor, "bags d"],
) -> Float32[Tensor, "bags d"]:
    """As `plain.weighted_sums`; `out` is contiguous."""
    bags, d = out.shape
    tensors = (tensor.contiguous() for tensor in (table, index, weight, starts))
    programs = (bags, triton.cdiv(d, COLUMNS))
    _launch(_weighted_sums, programs, *tensors, out.view(-1), d, PAIRS=PAIRS, COLUMNS=COLUMNS)
    return out


def reconstruct(
    W_dec: Float32[Tensor, "d_sae d_model"],
    feature: Int32[Tensor, " nnz"],
    value: Float32[Tensor, " nnz"],
    starts: Int64[Tensor, " rows_and_one"],
    target: Float32[Tensor, "rows d_model"],
) -> tuple[Float32[Tensor, "rows d_model"], Float32[Tensor, " nnz"]]:
    """As `plain.reconstruct`."""
    rows, d_model = target.shape
    error, pull = target.new_empty(rows, d_model), value.new_empty(len(value))
    tensors = (tensor.contiguous() for tensor in (W_dec, feature, value, starts, target))
    _launch(_reconstruct, (rows,), *tensors, error, pull, d_model, **_block(d_model))
    return error, pull


def kth_largest(values: Float32[Tensor, " n"], k: int) -> float:
    """As `plain.kth_largest`, but by `topk`: a single block of threads works on all that `kthvalue` is given."""
    return float(values.topk(k, sorted=False).values.min())


def remove_parallel(gradient: Float32[Tensor, "n d"], rows: Float32[Tensor, "n d"]) -> None:
    """As `plain.remove_parallel`; `gradient` is contiguous."""
    n, d = gradient.shape
    _launch(_remove_parallel, (n,), gradient.view(-1), rows.contiguous(), d, **_block(d))


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
    """As `plain.adam`; all four tensors are contiguous."""
    size, width = weight.numel(), weight.shape[-1] if unit_rows else ENTRIES
    tensors = (tensor.view(-1) for tensor in (weight, gradient, mean, square))
    rate = lr / (1 - BETAS[0] ** (step + 1))
    root = (1 - BETAS[1] ** (step + 1)) ** -0.5
    constants = {"BETA1": BETAS[0], "BETA2": BETAS[1], "EPSILON": EPSILON, "UNIT": unit_rows, **_block(width)}
    _launch(_adam, (triton.cdiv(size, width),), *tensors, size, width, scale, rate, root, **constants)


def _block(width: int) -> dict[str, int]:
    """The block that holds a row, and its warps: eight numbers a thread, until rows are wide."""
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(max(block // 256, 1), 16)}


def _launch(kernel: Any, programs: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Run a kernel on the device of its first tensor, which need not be the current one.

    Whether products and sums are fused is said here, since Triton's default changes with its version, and so would
    the bits.
    """
    with torch.cuda.device_of(arguments[0]):
        kernel[programs](*arguments, **constants, enable_fp_fusion=True)
