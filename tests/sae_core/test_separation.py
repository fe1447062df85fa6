import numpy as np
import pytest
from scipy.stats import mannwhitneyu
from sklearn.metrics import roc_auc_score

from sae_core.separation import auc, effect_sizes, interval, p_values

RNG = np.random.default_rng(0)
POSITIVE = np.round(RNG.normal(0.5, 1, (30, 7)).clip(0), 1)  # zeros and ties, as features have them
NEGATIVE = np.round(RNG.normal(0.0, 1, (25, 7)).clip(0), 1)


def test_auc_is_scikit_learns_ties_included() -> None:
    y = np.repeat([1, 0], [30, 25])
    wanted = [roc_auc_score(y, np.concatenate([POSITIVE[:, i], NEGATIVE[:, i]])) for i in range(7)]
    np.testing.assert_allclose(auc(POSITIVE, NEGATIVE), wanted)


def test_p_values_are_scipys_times_the_number_tried_and_a_constant_says_nothing() -> None:
    p = p_values(POSITIVE, NEGATIVE, tried=3)
    one = mannwhitneyu(POSITIVE[:, 2], NEGATIVE[:, 2], alternative="greater", method="asymptotic").pvalue
    assert p[2] == pytest.approx(min(1, 3 * one))
    assert p_values(np.zeros((5, 1)), np.zeros((5, 1)), tried=1)[0] == 1


def test_of_many_silly_numbers_none_is_significant_once_corrected() -> None:
    noise = np.random.default_rng(1).normal(size=(80, 2000))
    assert p_values(noise[:40], noise[40:], tried=1).min() < 0.01
    assert p_values(noise[:40], noise[40:], tried=2000).min() > 0.05


def test_effect_size_is_cohens_d_and_0_where_nothing_varies() -> None:
    assert effect_sizes(np.array([[2.0], [4.0]]), np.array([[0.0], [2.0]]))[0] == pytest.approx(2 / np.sqrt(2))
    assert effect_sizes(np.ones((3, 1)), np.zeros((3, 1)))[0] == 0
    assert effect_sizes(np.ones((1, 1)), np.zeros((1, 1)))[0] == 0  # one of each: nothing is known of the spread


def test_an_interval_holds_the_true_auc_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    hits = 0
    for seed in range(60):
        low, high = interval(rng.normal(1, 1, 40), rng.normal(0, 1, 40), seed=seed)
        hits += low <= 0.7602 <= high  # Phi(1 / sqrt(2))
    assert 50 <= hits <= 60


def test_copies_of_one_text_do_not_narrow_the_interval_when_they_are_one_group() -> None:
    few_positive, few_negative = RNG.normal(0.7, 1, 6), RNG.normal(0, 1, 6)
    many = [np.repeat(side, 10) for side in (few_positive, few_negative)]
    group = np.repeat(np.arange(6), 10)
    alone, grouped = interval(few_positive, few_negative), interval(*many, groups=(group, group))
    assert grouped == pytest.approx(alone)
    low, high = interval(*many)
    assert high - low < 0.6 * (grouped[1] - grouped[0])
