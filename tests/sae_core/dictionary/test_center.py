"""The geometric median, against what defines it."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_core.dictionary.center import geometric_median


@settings(deadline=None, max_examples=30)
@given(st.integers(0, 10_000), st.integers(1, 40))
def test_no_point_nearby_has_a_smaller_sum_of_distances(seed: int, n: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 3, generator=generator) + 5
    found = geometric_median(x)

    def total(point: torch.Tensor) -> float:
        return float((x.double() - point.double()).norm(dim=1).sum())

    for _ in range(20):
        assert total(found) <= total(found + 0.05 * torch.randn(3, generator=generator)) + 1e-4 * n


def test_a_few_far_off_rows_hardly_move_it_where_they_move_the_mean() -> None:
    x = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    x[:5] += 1000
    assert float(geometric_median(x).norm()) < 1
    assert float(x.mean(0).norm()) > 100


def test_it_may_be_one_of_the_rows_and_equal_rows_are_their_own_median() -> None:
    cross = torch.tensor([[0.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]])
    torch.testing.assert_close(geometric_median(cross), torch.zeros(2), atol=1e-5, rtol=0)
    torch.testing.assert_close(geometric_median(torch.full((4, 3), 7.0)), torch.full((3,), 7.0))
    torch.testing.assert_close(geometric_median(torch.zeros(4, 3)), torch.zeros(3))
