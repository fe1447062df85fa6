import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import balanced_accuracy_score, roc_auc_score

from sae_core.labels.scoring.metrics import auc_pairs, bootstrap

TEXTS = st.lists(st.tuples(st.booleans(), st.integers(-3, 3)), min_size=2, max_size=30).filter(
    lambda rows: len({fires for fires, _ in rows}) == 2
)


@settings(max_examples=30, deadline=None)
@given(TEXTS)
def test_the_mean_over_pairs_is_the_area_under_the_curve(rows):
    fires, similarity = np.array([f for f, _ in rows]), np.array([float(s) for _, s in rows])
    assert auc_pairs(similarity, fires).mean() == pytest.approx(roc_auc_score(fires, similarity))


@settings(max_examples=30, deadline=None)
@given(TEXTS)
def test_of_yes_and_no_the_mean_over_pairs_is_the_balanced_accuracy(rows):
    fires, says = np.array([f for f, _ in rows]), np.array([float(s > 0) for _, s in rows])
    assert auc_pairs(says, fires).mean() == pytest.approx(balanced_accuracy_score(fires, says))


def test_texts_without_an_answer_are_left_out():
    fires = np.array([True, True, False, False])
    says = np.array([1.0, math.nan, 0.0, math.nan])
    assert auc_pairs(says, fires).tolist() == [[1.0]]
    assert all(map(math.isnan, bootstrap(auc_pairs(np.full(4, math.nan), fires))))


@pytest.mark.parametrize("kind", ["accuracy", "auc"])
def test_the_interval_holds_the_truth_about_as_often_as_it_says(kind, monkeypatch):
    """Texts drawn anew 300 times from a known law; the percentile interval of 30 + 30 texts is a little too narrow."""
    monkeypatch.setattr("sae_core.labels.scoring.metrics.RESAMPLES", 400)
    rng = np.random.default_rng(0)
    fires = np.arange(60) < 30
    held = 0
    for _ in range(300):
        if kind == "accuracy":
            pairs, truth = auc_pairs((rng.random(60) < np.where(fires, 0.8, 0.3)).astype(float), fires), 0.75
        else:  # two normal laws one deviation apart: P(x > y) = Phi(1 / sqrt 2)
            pairs, truth = auc_pairs(rng.normal(size=60) + fires, fires), 0.5 * (1 + math.erf(0.5))
        low, high = bootstrap(pairs)
        held += low <= truth <= high
    assert 0.90 <= held / 300 <= 0.98


def test_the_difference_of_a_name_to_itself_is_nothing_and_the_draw_repeats():
    rng = np.random.default_rng(0)
    fires = np.arange(20) < 10
    pairs = auc_pairs(rng.normal(size=20), fires)
    assert bootstrap(pairs - pairs) == (0.0, 0.0)
    assert bootstrap(pairs) == bootstrap(pairs)
    assert bootstrap(pairs).low < pairs.mean() < bootstrap(pairs).high
