from itertools import combinations

import numpy as np
import pytest

from sae_core.multilingual import MultilingualError, parallel_texts, retrieved, scores, shared
from sae_core.study import MultilingualSettings

RNG = np.random.default_rng(0)


def test_the_score_is_the_mean_correlation_over_pairs_of_languages() -> None:
    values = RNG.random((4, 12, 3))
    values[:, :, 2] = values[0, :, 2]  # the same in every language
    values[1, :, 1] = 0  # never varies in one
    found = scores(values)
    for feature in (0, 2):
        pairs = [np.corrcoef(values[a, :, feature], values[b, :, feature])[0, 1] for a, b in combinations(range(4), 2)]
        assert found[feature] == pytest.approx(np.mean(pairs))
    three = [np.corrcoef(values[a, :, 1], values[b, :, 1])[0, 1] for a, b in combinations((0, 2, 3), 2)]
    assert found[1] == pytest.approx(sum(three) / 6)


def test_a_feature_of_content_scores_above_every_shuffle_and_one_of_language_does_not() -> None:
    content = (RNG.random(30) < 0.3) * 1.0
    values = np.stack([np.stack([content, np.full(30, float(i)) + RNG.random(30)], 1) for i in range(5)])
    shuffled = [scores(np.stack([v[RNG.permutation(30)] for v in values])) for _ in range(50)]
    assert scores(values)[0] > 3 * max(s[0] for s in shuffled)
    assert scores(values)[1] < max(s[1] for s in shuffled)


def test_an_item_is_shared_when_the_feature_fires_on_it_in_enough_languages() -> None:
    values = np.zeros((3, 4, 1))
    values[:2, 0] = 1
    values[:, 1] = 1
    values[0, 2] = 1
    assert shared(values, 2)[0] == 0.5
    assert shared(values, 3)[0] == 0.25


def test_items_are_found_again_by_what_is_alike_about_them() -> None:
    items = RNG.normal(size=(20, 40))
    assert retrieved(items, items + 0.01 * RNG.normal(size=(20, 40))) == 1
    assert retrieved(items, items[::-1]) == 0


@pytest.mark.parametrize(
    ("settings", "why"),
    [
        ({"languages": ["en", "xx"]}, "'xx' is none of ar, de, en"),
        ({"languages": ["en", "fr"]}, "2 are fewer than least_languages = 5"),
    ],
)
def test_languages_without_parallel_texts_and_too_few_are_refused(settings: dict, why: str) -> None:
    with pytest.raises(MultilingualError, match=why):
        parallel_texts(MultilingualSettings(**settings))
