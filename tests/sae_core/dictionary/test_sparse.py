"""Pairs, and what is made of kernels, against the plainest thing that computes the same."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_core.dictionary import sparse
from sae_core.dictionary.sparse import Groups, Pairs, group_sums, kth_largest, propose, reconstruct, sums

N, D_SAE, D_MODEL = 7, 11, 5


@pytest.fixture
def pairs() -> Pairs:
    mask = torch.rand(N, D_SAE, generator=torch.Generator().manual_seed(1)) < 0.3
    mask[:, 4] = False  # a feature that never fires
    mask[2] = False  # a row on which nothing fires
    return Pairs(*mask.nonzero().int().unbind(1))


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("block_bytes", [1, 40, 1 << 20])
def test_every_positive_place_is_proposed_once_in_row_order(
    dtype: torch.dtype, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse, "BLOCK_BYTES", {"cpu": block_bytes})
    x, weight, bias = normal(N, D_MODEL).to(dtype), normal(D_SAE, D_MODEL).to(dtype), normal(D_SAE).to(dtype)
    z = x.double() @ weight.double().T + bias.double()
    found = propose(x, weight, bias)
    got = list(zip(found.row.tolist(), found.feature.tolist(), strict=True))
    assert got == sorted(set(got))
    assert {(n, i) for n in range(N) for i in range(D_SAE) if z[n, i] > 1e-2} <= set(got)
    assert all(z[n, i] > -1e-2 for n, i in got)


def test_nan_and_negative_zero_are_not_proposed() -> None:
    weight, bias = torch.zeros(3, D_MODEL), torch.tensor([-0.0, torch.nan, 1.0])
    found = propose(torch.ones(2, D_MODEL), weight, bias)
    assert set(found.feature.tolist()) - {1} == {2}


def test_group_sums_are_sums_over_the_pairs_of_a_key(pairs: Pairs) -> None:
    table, weight = normal(N, D_MODEL), normal(len(pairs.row), seed=2)
    expected = torch.zeros(D_SAE, D_MODEL)
    for n, i, w in zip(pairs.row, pairs.feature, weight, strict=True):
        expected[i] += w * table[n]
    out = torch.empty(D_SAE, D_MODEL)
    torch.testing.assert_close(group_sums(table, pairs.row, weight, Groups.by(pairs.feature, D_SAE), out), expected)


def test_sums_are_sums_over_features(pairs: Pairs) -> None:
    value = normal(len(pairs.row))
    expected = torch.zeros(D_SAE).index_add_(0, pairs.feature, value)
    torch.testing.assert_close(sums(value, Groups.by(pairs.feature, D_SAE)), expected)


def test_a_reconstruction_is_a_product_with_the_decoder(pairs: Pairs) -> None:
    value, W_dec, target = normal(len(pairs.row)), normal(D_SAE, D_MODEL, seed=3), normal(N, D_MODEL, seed=4)
    dense = torch.zeros(N, D_SAE)
    dense[pairs.row.long(), pairs.feature.long()] = value
    torch.testing.assert_close(reconstruct(pairs, value, W_dec, target)[0], dense @ W_dec - target)


def test_nothing_active_gives_zeros() -> None:
    none = Pairs(torch.zeros(0, dtype=torch.int32), torch.zeros(0, dtype=torch.int32))
    error, pull = reconstruct(none, torch.zeros(0), normal(D_SAE, D_MODEL), normal(N, D_MODEL, seed=4))
    assert torch.equal(error, -normal(N, D_MODEL, seed=4))
    assert not len(pull)
    assert sums(torch.zeros(0), Groups.by(none.feature, D_SAE)).eq(torch.zeros(D_SAE)).all()


def test_of_too_few_values_none_ranks_kth() -> None:
    assert kth_largest(torch.tensor([3.0, 1.0, 2.0]), 2) == 2
    assert kth_largest(torch.tensor([3.0]), 2) == -torch.inf


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 40), st.integers(0, 10_000))
def test_gradients_of_decoding_are_the_other_operations(n_pairs: int, seed: int) -> None:
    """Those for the values come with the error, those for W_dec are group sums: both as autograd finds them."""
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randperm(N * D_SAE, generator=generator)[:n_pairs].sort().values.int()
    pairs = Pairs(flat // D_SAE, flat % D_SAE)
    value = torch.randn(n_pairs, generator=generator, requires_grad=True)
    W_dec = torch.randn(D_SAE, D_MODEL, generator=generator, requires_grad=True)
    target = torch.randn(N, D_MODEL, generator=generator)
    dense = torch.zeros(N, D_SAE).index_put((pairs.row.long(), pairs.feature.long()), value)
    d_value, d_W_dec = torch.autograd.grad((dense @ W_dec - target).square().sum() / 2, [value, W_dec])
    error, pull = reconstruct(pairs, value.detach(), W_dec.detach(), target)
    torch.testing.assert_close(pull, d_value)
    groups, out = Groups.by(pairs.feature, D_SAE), torch.empty(D_SAE, D_MODEL)
    torch.testing.assert_close(group_sums(error, pairs.row, value.detach(), groups, out), d_W_dec)
