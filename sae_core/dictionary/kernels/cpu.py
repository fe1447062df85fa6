"""The kernels for the CPU: loops that numba compiles (`loops.py`), spread over torch's number of threads.

Each thread takes rows, bags or pairs of its own, so that no sum is shared between threads.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int, Int32, Int64
from torch import Tensor

from sae_core.dictionary.kernels import loops
from sae_core.dictionary.kernels.loops import GROUP
from sae_core.dictionary.kernels.plain import BETAS, EPSILON

CHUNKS = 4
"""Parts of the work for each thread, so that one with longer rows does not keep the others waiting."""
NEAR = {torch.bfloat16: 6, torch.float32: 6 << 16}
"""A float's bits, read as an integer, less this, are 2 to 5% less of it: many times bfloat16's error."""


def places(block: Float[Tensor, "rows d_sae"], k: int | None) -> tuple[Int64[Tensor, " rows"], Int32[Tensor, " found"]]:
    """As `plain.places`; the k-th largest is bounded from below by the k-th largest maximum of groups of entries."""
    keys = block.view(torch.int16 if block.dtype == torch.bfloat16 else torch.int32).numpy()  # positive in both or none
    rows, d_sae = keys.shape
    enough = k if k is not None and k <= d_sae // GROUP else 0
    counts, found = np.empty(rows, np.int64), np.empty(rows * d_sae, np.int32)
    parts = _spread(loops.columns_above, rows, keys, enough, NEAR[block.dtype], counts, found)
    columns = np.concatenate([found[first * d_sae : first * d_sae + n] for first, n in parts])
    return torch.from_numpy(counts), torch.from_numpy(columns)


def order_by(key: Int[Tensor, " nnz"], n: int) -> tuple[Int64[Tensor, " nnz"], Int64[Tensor, " n_and_one"]]:
    """As `plain.order_by`."""
    order, starts = np.empty(len(key), np.int64), np.zeros(n + 2, np.int64)
    loops.count_and_place(key.numpy(), order, starts)
    return torch.from_numpy(order), torch.from_numpy(starts[:-1])


def dots(
    a: Float32[Tensor, "m d"], i: Int[Tensor, " nnz"], b: Float32[Tensor, "n d"], j: Int[Tensor, " nnz"]
) -> Float32[Tensor, " nnz"]:
    """As `plain.dots`; each row of `a` is read once, so `b` is better the smaller of the two."""
    out, order = np.empty(len(i), np.float32), order_by(i, len(a))[0]
    _spread(loops.dots, len(i), *(tensor.numpy() for tensor in (order, a, i, b, j)), out)
    return torch.from_numpy(out)


def weighted_sums(
    table: Float32[Tensor, "n d"],
    index: Int[Tensor, " nnz"],
    weight: Float32[Tensor, " nnz"],
    starts: Int64[Tensor, " bags_and_one"],
    out: Float32[Tensor, "bags d"],
) -> Float32[Tensor, "bags d"]:
    """As `plain.weighted_sums`."""
    _spread(loops.weighted_sums, len(out), table.numpy(), index.numpy(), weight.numpy(), starts.numpy(), out.numpy())
    return out


def reconstruct(
    W_dec: Float32[Tensor, "d_sae d_model"],
    feature: Int32[Tensor, " nnz"],
    value: Float32[Tensor, " nnz"],
    starts: Int64[Tensor, " rows_and_one"],
    target: Float32[Tensor, "rows d_model"],
) -> tuple[Float32[Tensor, "rows d_model"], Float32[Tensor, " nnz"]]:
    """As `plain.reconstruct`: each row's decoder rows are read once, while they are in the cache."""
    error, pull = np.empty(tuple(target.shape), np.float32), np.empty(len(value), np.float32)
    arrays = (tensor.numpy() for tensor in (W_dec, feature, value, starts, target))
    _spread(loops.reconstruct, len(error), *arrays, error, pull)
    return torch.from_numpy(error), torch.from_numpy(pull)


def largest_of_rows(
    z: Float32[Tensor, " nnz"], starts: Int64[Tensor, " rows_and_one"], k: int
) -> Int64[Tensor, " kept"]:
    """As `plain.largest_of_rows`; of equal values at the end the first ones are taken."""
    found = np.empty(len(z), np.int64)
    parts = _spread(loops.largest_of_rows, len(starts) - 1, z.numpy(), starts.numpy(), k, found)
    return torch.from_numpy(np.concatenate([found[starts[first] : starts[first] + n] for first, n in parts]))


def kth_largest(values: Float32[Tensor, " n"], k: int) -> float:
    """As `plain.kth_largest`."""
    return float(np.partition(values.numpy(), len(values) - k)[len(values) - k])


def remove_parallel(gradient: Float32[Tensor, "n d"], rows: Float32[Tensor, "n d"]) -> None:
    """As `plain.remove_parallel`."""
    _spread(loops.remove_parallel, len(rows), gradient.numpy(), rows.numpy())


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
    """As `plain.adam`."""
    arrays = [tensor.view(-1, tensor.shape[-1]).numpy() for tensor in (weight, gradient, mean, square)]
    rate = lr / (1 - BETAS[0] ** (step + 1))
    root = (1 - BETAS[1] ** (step + 1)) ** -0.5
    numbers = (np.float32(number) for number in (scale, *BETAS, rate, root, EPSILON))
    _spread(loops.adam, len(arrays[0]), *arrays, *numbers, unit_rows)


def _spread(kernel: Callable[..., Any], n: int, *arguments: Any) -> list[tuple[int, Any]]:
    """Run a kernel on the range 0 .. n in parts, on torch's number of threads: each part's start, and its result."""
    threads = torch.get_num_threads()
    ends = np.linspace(0, n, (threads * CHUNKS if threads > 1 else 1) + 1).astype(int).tolist()
    run = _pool(os.getpid(), threads).map if threads > 1 else map
    return list(
        zip(ends[:-1], run(lambda first, end: kernel(first, end, *arguments), ends[:-1], ends[1:]), strict=True)
    )


@lru_cache(maxsize=1)
def _pool(process: int, threads: int) -> ThreadPoolExecutor:
    """Threads of this process: a fork does not inherit them."""
    return ThreadPoolExecutor(threads, thread_name_prefix="kernels")
