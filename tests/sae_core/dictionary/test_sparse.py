"""Each kernel against the plainest thing that computes the same."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_core.dictionary import sparse
from sae_core.dictionary.sparse import Pairs, decode, dots, propose, sums, weighted_sums

N, D_SAE, D_MODEL = 7, 11, 5


@pytest.fixture
def pairs() -> Pairs:
    mask = torch.rand(D_SAE, N, generator=torch.Generator().manual_seed(1)) < 0.3
    mask[4] = False  # a feature that never fires
    mask[:, 2] = False  # a row on which nothing fires
    feature, row = mask.nonzero().int().unbind(1)
    return Pairs(row, feature)


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("block_bytes", [1, 40, 1 << 20])
def test_every_positive_place_is_proposed_once_in_feature_order(
    dtype: torch.dtype, block_bytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparse, "BLOCK_BYTES", block_bytes)
    x, weight, bias = normal(N, D_MODEL).to(dtype), normal(D_SAE, D_MODEL).to(dtype), normal(D_SAE).to(dtype)
    found = propose(x, weight, bias)
    expected = [
        (i, n) for i in range(D_SAE) for n in range(N) if float(x[n].double() @ weight[i].double() + bias[i]) > 1e-2
    ]
    got = list(zip(found.feature.tolist(), found.row.tolist(), strict=True))
    assert got == sorted(set(got))
    assert set(expected) <= set(got)
    assert all(float(x[n].double() @ weight[i].double() + bias[i]) > -1e-2 for i, n in got)


def test_nan_and_negative_zero_are_not_proposed() -> None:
    weight, bias = torch.zeros(3, D_MODEL), torch.tensor([-0.0, torch.nan, 1.0])
    found = propose(torch.ones(2, D_MODEL), weight, bias)
    assert set(found.feature.tolist()) - {1} == {2}


def test_dots_are_dot_products(pairs: Pairs) -> None:
    a, b = normal(D_SAE, D_MODEL), normal(N, D_MODEL, seed=1)
    expected = [float(a[i] @ b[j]) for i, j in zip(pairs.feature, pairs.row, strict=True)]
    torch.testing.assert_close(dots(a, pairs.feature, b, pairs.row), torch.tensor(expected))


def test_weighted_sums_are_sums_over_bags(pairs: Pairs) -> None:
    table, weight = normal(N, D_MODEL), normal(len(pairs.row), seed=2)
    expected = torch.zeros(D_SAE, D_MODEL)
    for i, n, w in zip(pairs.feature, pairs.row, weight, strict=True):
        expected[i] += w * table[n]
    torch.testing.assert_close(weighted_sums(table, pairs.row, weight, pairs.feature, D_SAE), expected)


def test_sums_are_sums_over_features(pairs: Pairs) -> None:
    value = normal(len(pairs.row))
    expected = torch.zeros(D_SAE).index_add_(0, pairs.feature, value)
    torch.testing.assert_close(sums(value, pairs.feature, D_SAE), expected)


def test_decoding_is_a_product_with_the_decoder(pairs: Pairs) -> None:
    value, W_dec = normal(len(pairs.row)), normal(D_SAE, D_MODEL, seed=3)
    dense = torch.zeros(N, D_SAE)
    dense[pairs.row.long(), pairs.feature.long()] = value
    torch.testing.assert_close(decode(pairs, value, W_dec, N), dense @ W_dec)


def test_nothing_active_gives_zeros() -> None:
    none = Pairs(torch.zeros(0, dtype=torch.int32), torch.zeros(0, dtype=torch.int32))
    assert decode(none, torch.zeros(0), normal(D_SAE, D_MODEL), N).eq(torch.zeros(N, D_MODEL)).all()
    assert sums(torch.zeros(0), none.feature, D_SAE).eq(torch.zeros(D_SAE)).all()


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 40), st.integers(0, 10_000))
def test_gradients_of_decoding_are_the_other_kernels(n_pairs: int, seed: int) -> None:
    """d(loss)/d(value) is `dots`, d(loss)/d(W_dec) is `weighted_sums` over features: both as autograd finds them."""
    generator = torch.Generator().manual_seed(seed)
    flat = torch.randperm(N * D_SAE, generator=generator)[:n_pairs].sort().values.int()
    pairs = Pairs(flat % N, flat // N)
    value = torch.randn(n_pairs, generator=generator, requires_grad=True)
    W_dec = torch.randn(D_SAE, D_MODEL, generator=generator, requires_grad=True)
    upstream = torch.randn(N, D_MODEL, generator=generator)
    dense = torch.zeros(N, D_SAE).index_put((pairs.row.long(), pairs.feature.long()), value)
    d_value, d_W_dec = torch.autograd.grad((dense @ W_dec * upstream).sum(), [value, W_dec])
    torch.testing.assert_close(dots(W_dec.detach(), pairs.feature, upstream, pairs.row), d_value)
    torch.testing.assert_close(weighted_sums(upstream, pairs.row, value.detach(), pairs.feature, D_SAE), d_W_dec)
