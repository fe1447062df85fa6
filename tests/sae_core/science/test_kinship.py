"""Firings, twins and ancestors, held against dense arithmetic and against dictionaries made from one another."""

from functools import partial

import numpy as np
import pytest
import torch

from sae_core.dictionary import Dictionary
from sae_core.science.firings import Firings, Sample, principal_directions, random_directions
from sae_core.science.kinship import kin, nearest, share_interval, tree, universality

D_MODEL, N = 24, 600


def dictionary(rows: torch.Tensor, threshold: float = 0.5) -> Dictionary:
    rows = torch.nn.functional.normalize(rows, dim=1)
    zeros, config = torch.zeros(len(rows)), {"architecture": "batch_top_k", "k": 3}
    return Dictionary(rows.T.clone(), zeros, rows, torch.zeros(D_MODEL), zeros + threshold, config)


@pytest.fixture(scope="module")
def sample() -> Sample:
    generator = torch.Generator().manual_seed(0)
    places = np.arange(N, dtype=np.int32)
    return Sample(torch.randn(N, D_MODEL, generator=generator), places // 20, places % 20, places % 7)


@pytest.fixture(scope="module")
def rows() -> torch.Tensor:
    return torch.randn(16, D_MODEL, generator=torch.Generator().manual_seed(1))


def test_firings_correlations_and_masked_similarities_are_those_of_dense_arrays(sample: Sample, rows: torch.Tensor):
    one, other = dictionary(rows), dictionary(rows[:5] + 0.5 * rows[5:10])
    dense, dense_other = one.encode(sample.acts).numpy(), other.encode(sample.acts).numpy()
    firings, others = Firings.of(one, sample), Firings.of(other, sample)
    assert np.allclose(firings.values.toarray(), dense, atol=1e-5)
    wanted = np.corrcoef(dense.T, dense_other.T)[:16, 16:]
    assert np.allclose(firings.correlations(others), wanted, atol=1e-5)
    fires = dense[:, 3] > 0
    a, b = dense[fires, 3], dense_other[fires, 2]
    masked = float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    assert firings.masked_similarity(others)[3, 2] == pytest.approx(masked, abs=1e-5)
    assert firings.strongest(4, 3).tolist() == np.argsort(-dense[:, 4])[:3].tolist()
    assert firings.counts.tolist() == (dense > 0).sum(0).tolist()


def test_what_never_fires_correlates_with_nothing(sample: Sample, rows: torch.Tensor):
    silent = Firings.of(dictionary(rows, threshold=1e6), sample)
    assert not silent.correlations(Firings.of(dictionary(rows), sample)).any()
    assert not silent.counts.any()


def test_a_dictionary_in_another_order_is_its_own_twin_and_random_directions_are_not(
    sample: Sample, rows: torch.Tensor
):
    one = dictionary(rows)
    other = one.reordered(torch.randperm(16, generator=torch.Generator().manual_seed(2)))
    random = random_directions(16, 3, sample, seed=5)
    found = universality(one, other, random, tuple(Firings.of(d, sample) for d in (one, other, random)))
    assert (found.shared, found.by_frequency) == (1, [1, 1, 1])
    assert found.correlation == pytest.approx(1, abs=1e-5)
    assert found.shared_random < 0.2
    assert found.correlation_random < 0.8
    cosine, which = nearest(one.W_dec, other.W_dec)
    assert np.allclose(cosine, 1)
    assert torch.equal(other.W_dec[which], one.W_dec)


def test_children_lie_under_the_feature_they_were_made_of_and_what_is_new_under_none(
    sample: Sample, rows: torch.Tensor
):
    parents = dictionary(rows[:4])
    noise = torch.randn(8, D_MODEL, generator=torch.Generator().manual_seed(3))
    near = parents.W_dec.repeat_interleave(2, 0) + 0.5 * torch.nn.functional.normalize(noise, dim=1)
    apart = torch.linalg.qr(torch.cat([parents.W_dec, rows[4:7]]).T).Q.T[4:]
    larger = dictionary(torch.cat([near, apart]))
    found = kin(parents, larger, (Firings.of(parents, sample), Firings.of(larger, sample)))
    assert found.children() == {0: [0, 1], 1: [2, 3], 2: [4, 5], 3: [6, 7]}
    assert found.feature[found.cosine < 0.3].tolist() == [8, 9, 10]
    assert not found.under[8:].any()
    assert [row["parent"] for row in found.rows()] == [0, 0, 1, 1, 2, 2, 3, 3, None, None, None]
    names = {4: [f"p{i}" for i in range(4)], 11: [f"c{i}" for i in range(11)]}
    assert tree([found], names, roots=1) == ["4/0: p0", "  11/0: c0", "  11/1: c1"]
    assert tree([], names, roots=3) == []


@pytest.mark.parametrize(
    "directions", [lambda sample: random_directions(16, 3, sample), partial(principal_directions, 3)]
)
def test_bases_fire_as_often_as_the_dictionary_they_are_held_against(directions, sample: Sample):
    found = directions(sample)
    assert Firings.of(found, sample).counts.sum() / N == pytest.approx(3, abs=0.05)
    assert torch.allclose(found.W_dec.norm(dim=1), torch.ones(found.d_sae), atol=1e-5)
    if found.d_sae == 2 * D_MODEL:  # principal ones
        assert torch.allclose(found.W_dec[:D_MODEL] @ found.W_dec[:D_MODEL].T, torch.eye(D_MODEL), atol=1e-4)


def test_firings_that_come_in_parts_and_out_of_order_are_the_same(sample: Sample, rows: torch.Tensor):
    one = dictionary(rows)
    order = np.random.default_rng(0).permutation(N)
    parts = [(some, sample.acts[torch.from_numpy(some)]) for some in np.array_split(order, 7)]
    whole = Firings.of(one, sample)
    assert np.allclose(Firings.of_parts(one, parts, N).values.toarray(), whole.values.toarray(), atol=1e-6)
    assert np.array_equal(whole.at(order[:50]).values.toarray(), whole.values.toarray()[order[:50]])
    few = sample.whole_blocks(50, seed=0)
    assert len(few) == 60
    assert all(np.isin(np.flatnonzero(sample.block == block), few).all() for block in set(sample.block[few].tolist()))


def test_a_share_of_everything_has_no_interval_and_one_of_half_has():
    assert share_interval(np.ones(50, bool)) == (1, 1)
    low, high = share_interval(np.arange(100) < 50)
    assert 0.35 < low < 0.5 < high < 0.65
