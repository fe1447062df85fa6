"""The operations of a sparse step that are worth code of their own for a kind of device.

    places         where a block of pre-activations is positive, or near the k largest of its row
    order_by       a stable order by feature (or row), and where each one's entries start
    dots           a[i] . b[j] for given pairs (i, j)
    weighted_sums  sum of weight * table[index] over each bag
    reconstruct    what a sparse reconstruction gets wrong, and how much each of its entries is to blame
    kth_largest    the value that ranks k-th
    largest_of_rows  where the k largest of each row are
    remove_parallel, adam   the step that follows the gradients

`plain` has each in PyTorch, for every device, and is what the others are tested against; `cpu` has them in numba,
`cuda` in Triton. All sums run in an order that depends on the input alone: the same input gives the same bits, on any
number of threads.
"""

from importlib.util import find_spec
from types import ModuleType

import torch

from sae_core.dictionary.kernels import cpu, plain

TRITON = find_spec("triton") is not None
"""PyTorch's wheels for CUDA bring it; where they do not (on Windows, say), `plain` serves."""


def kernels(device: torch.device) -> ModuleType:
    """The kernels for a device."""
    if device.type == "cuda" and TRITON:
        from sae_core.dictionary.kernels import cuda  # only now: Triton need not be there, and takes time to import

        return cuda
    return cpu if device.type == "cpu" else plain
