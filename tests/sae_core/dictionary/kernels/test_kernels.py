"""Each kernel, of every module that has it, against the plainest loop that computes the same.

What is marked `gpu` runs on a CUDA device, or, with TRITON_INTERPRET=1, in Triton's interpreter on the CPU.
"""

import itertools
import os
from collections.abc import Iterator
from importlib import import_module
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_core.dictionary.kernels import cpu

N, D_SAE, D_MODEL = 7, 11, 5
GPU = "cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda"
MODULES = [
    pytest.param(("plain", "cpu"), id="plain"),
    pytest.param(("cpu", "cpu"), id="cpu"),
    pytest.param(("plain", GPU), id="plain on a GPU", marks=pytest.mark.gpu),
    pytest.param(("cuda", GPU), id="cuda", marks=pytest.mark.gpu),
]


@pytest.fixture(scope="module", params=MODULES)
def kernels(request: pytest.FixtureRequest) -> Iterator[ModuleType]:
    """A module of kernels, while tensors are made on a device that it is for."""
    name, device = request.param
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip(f"NOT RUN on a GPU: the kernels of `{name}`; there is no CUDA device here")
    if name == "cuda":
        pytest.importorskip("triton", reason="NOT RUN on a GPU: the kernels of `cuda`; triton is not installed")
    with torch.device(device):
        yield import_module(f"sae_core.dictionary.kernels.{name}")


@pytest.fixture(params=[1, 3], autouse=True)
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    """No kernel's result may depend on the number of threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=generator(seed), device="cpu").to(torch.get_default_device())


def entries(n: int, below: int, seed: int = 0) -> torch.Tensor:
    numbers = torch.randint(below, (n,), generator=generator(seed), dtype=torch.int32, device="cpu")
    return numbers.to(torch.get_default_device())


def generator(seed: int) -> torch.Generator:
    """The same numbers on every device."""
    return torch.Generator("cpu").manual_seed(seed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("d_sae", [1, 31, 32, 33, 100])
def test_places_are_the_positive_entries_in_row_order(kernels: ModuleType, d_sae: int, dtype: torch.dtype) -> None:
    block = (normal(N, d_sae) - 0.5).to(dtype)
    block[2] = -1  # a row without any
    block[3] = 1  # a row that is all
    block[4, 0], block[5, 0] = 0.0, -0.0
    counts, columns = kernels.places(block, None)
    assert counts.tolist() == [int((row > 0).sum()) for row in block]
    assert columns.tolist() == [c for row in block.tolist() for c, value in enumerate(row) if value > 0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("k", [1, 3, 32, 200])
def test_places_near_the_k_largest_hold_the_k_largest_and_nothing_far_below(
    kernels: ModuleType, k: int, dtype: torch.dtype
) -> None:
    block = normal(20, 128).to(dtype)
    counts, columns = kernels.places(block, k)
    for row, found in zip(block.float(), columns.split(counts.tolist()), strict=True):
        largest = row.topk(min(k, 128))
        wanted = set(largest.indices[largest.values > 0].tolist())
        assert wanted <= set(found.tolist())
        assert (row[found.long()] > 0).all()


def test_most_entries_of_a_wide_row_are_no_places_near_the_k_largest(kernels: ModuleType) -> None:
    counts, _ = kernels.places(normal(20, 4096), 16)
    assert counts.max() < 64


@pytest.mark.parametrize("k", [1, 3, 50])
def test_largest_of_rows_are_the_places_of_the_k_largest_positive_values(kernels: ModuleType, k: int) -> None:
    z, ends = normal(60), [0, 0, 1, 20, 21, 60]  # an empty row, rows of one, and two long ones
    places = kernels.largest_of_rows(z, torch.tensor(ends), k)
    wanted = [
        place
        for first, end in itertools.pairwise(ends)
        for place in sorted(sorted(range(first, end), key=lambda n: -z[n].item())[:k])
        if z[place] > 0
    ]
    assert places.tolist() == wanted
    assert kernels.largest_of_rows(z[:0], torch.tensor([0]), k).tolist() == []


def test_of_equal_values_no_more_than_k_are_the_largest_of_a_row(kernels: ModuleType) -> None:
    z = torch.tensor([2.0, 1.0, 1.0, 3.0, 1.0, 0.0, 0.0, 0.0])
    places = kernels.largest_of_rows(z, torch.tensor([0, 5, 8]), 3).tolist()
    assert len(places) == 3
    assert {0, 3} < set(places) < {0, 1, 2, 3, 4}


@settings(deadline=None, max_examples=30)
@given(key=st.lists(st.integers(0, 9), max_size=40))
def test_an_order_by_key_is_stable_and_says_where_each_key_starts(kernels: ModuleType, key: list[int]) -> None:
    order, starts = kernels.order_by(torch.tensor(key, dtype=torch.int32), 10)
    assert order.tolist() == sorted(range(len(key)), key=lambda n: key[n])
    assert starts.tolist() == [sum(k < i for k in key) for i in range(11)]


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("d", [1, D_MODEL, 200])
def test_dots_are_dot_products(kernels: ModuleType, d: int, index: torch.dtype) -> None:
    a, b = normal(D_SAE, d), normal(N, d, seed=1)
    i, j = entries(30, D_SAE).to(index), entries(30, N, seed=1).to(index)
    expected = torch.stack([a[m] @ b[n] for m, n in zip(i.tolist(), j.tolist(), strict=True)])
    torch.testing.assert_close(kernels.dots(a, i, b, j), expected)
    assert len(kernels.dots(a, i[:0], b, j[:0])) == 0


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("d", [1, D_MODEL, 200])
def test_weighted_sums_are_sums_over_bags(kernels: ModuleType, d: int, index: torch.dtype) -> None:
    table, where, weight = normal(N, d), entries(49, N).to(index), normal(49, seed=2)
    starts = torch.tensor([0, 0, 4, 4, 49])
    expected = torch.zeros(4, d)
    for bag, (first, end) in enumerate(itertools.pairwise(starts.tolist())):
        for n in range(first, end):
            expected[bag] += weight[n] * table[where[n]]
    out = torch.full((4, d), torch.nan)
    assert kernels.weighted_sums(table, where, weight, starts, out) is out
    torch.testing.assert_close(out, expected)


def test_bags_without_any_entry_sum_to_zeros(kernels: ModuleType) -> None:
    none, starts = entries(0, N), torch.zeros(4, dtype=torch.int64)
    out = kernels.weighted_sums(normal(N, D_MODEL), none, normal(0), starts, torch.full((3, D_MODEL), torch.nan))
    assert (out == 0).all()


@pytest.mark.parametrize("d", [1, D_MODEL, 200])
def test_reconstruct_gives_the_error_and_what_each_entry_adds_to_it(kernels: ModuleType, d: int) -> None:
    """Half the gradient of |decoded - target|^2 for the values, as autograd finds it."""
    W_dec, feature, target = normal(D_SAE, d), entries(9, D_SAE), normal(4, d, seed=3)
    starts, row = torch.tensor([0, 0, 4, 4, 9]), torch.tensor([1, 1, 1, 1, 3, 3, 3, 3, 3])
    value = normal(9, seed=2).requires_grad_()
    decoded = torch.zeros(4, d).index_add(0, row, value[:, None] * W_dec[feature.long()])
    ((decoded - target).square().sum() / 2).backward()
    error, pull = kernels.reconstruct(W_dec, feature, value.detach(), starts, target)
    torch.testing.assert_close(error, (decoded - target).detach())
    torch.testing.assert_close(pull, value.grad)


def test_what_nothing_reconstructs_is_all_error(kernels: ModuleType) -> None:
    target, starts = normal(4, D_MODEL), torch.zeros(5, dtype=torch.int64)
    error, pull = kernels.reconstruct(normal(D_SAE, D_MODEL), entries(0, D_SAE), normal(0), starts, target)
    torch.testing.assert_close(error, -target)
    assert len(pull) == 0


@pytest.mark.parametrize("k", [1, 5, 40])
def test_the_kth_largest_is_the_kth_of_the_sorted(kernels: ModuleType, k: int) -> None:
    values = normal(40)
    assert kernels.kth_largest(values, k) == sorted(values.tolist(), reverse=True)[k - 1]


@pytest.mark.parametrize("d", [1, D_MODEL, 200])
def test_the_parallel_part_of_a_gradient_is_removed(kernels: ModuleType, d: int) -> None:
    rows = torch.nn.functional.normalize(normal(N, d), dim=1)
    gradient = normal(N, d, seed=1)
    expected = gradient - (gradient * rows).sum(1, keepdim=True) * rows
    kernels.remove_parallel(gradient, rows)
    torch.testing.assert_close(gradient, expected)


@pytest.mark.parametrize("shape", [(N, D_MODEL), (N, 200), (N,), (1100,)])
def test_adam_is_that_of_pytorch(kernels: ModuleType, shape: tuple[int, ...]) -> None:
    ours, mean, square = normal(*shape), torch.zeros(shape), torch.zeros(shape)
    theirs = ours.clone().requires_grad_()
    adam = torch.optim.Adam([theirs], lr=0.01)
    for step in range(5):
        gradient = normal(*shape, seed=step + 1)
        theirs.grad = gradient * 0.3
        adam.step()
        kernels.adam(ours, gradient.clone(), mean, square, step, 0.01, 0.3, False)
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("d", [D_MODEL, 200])
def test_adam_leaves_rows_of_unit_norm_where_asked(kernels: ModuleType, d: int) -> None:
    gradient, state = normal(N, d, seed=1), torch.zeros(2, N, d)
    free, unit = normal(N, d), normal(N, d)
    kernels.adam(free, gradient.clone(), state[0].clone(), state[1].clone(), 0, 0.1, 1.0, False)
    kernels.adam(unit, gradient.clone(), state[0].clone(), state[1].clone(), 0, 0.1, 1.0, True)
    torch.testing.assert_close(unit, torch.nn.functional.normalize(free, dim=1))


def test_the_same_input_gives_the_same_bits(kernels: ModuleType) -> None:
    table, index, weight = normal(50, 200), entries(300, 50), normal(300, seed=2)
    starts = torch.arange(0, 301, 30)

    def results() -> list[torch.Tensor]:
        sums = kernels.weighted_sums(table, index, weight, starts, torch.empty(10, 200))
        return [
            sums,
            kernels.dots(table, index, table, index.flip(0)),
            *kernels.reconstruct(table, index, weight, starts, sums),
        ]

    assert all(torch.equal(a, b) for a, b in zip(results(), results(), strict=True))


def test_bits_do_not_depend_on_the_number_of_threads() -> None:
    table, index, weight = normal(50, 64), entries(3000, 50), normal(3000, seed=2)
    starts = torch.arange(0, 3001, 30)
    results = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        sums = cpu.weighted_sums(table, index, weight, starts, torch.empty(100, 64))
        results.append((sums, cpu.dots(table, index, table, index.flip(0))))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))
