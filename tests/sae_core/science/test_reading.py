"""Names made of tokens: what they tell of planted units, and what another unit's name tells."""

import numpy as np
import pytest
import torch
from scipy.sparse import csc_matrix

from sae_core.science.firings import Firings, Sample
from sae_core.science.reading import difference, read_units, variants

STRINGS = [" Cat", "cat", " dog", " the", " of", " sun", " moon", " rain"]
N = 4000


@pytest.fixture(scope="module")
def sample() -> Sample:
    token = np.random.default_rng(0).integers(0, len(STRINGS), N).astype(np.int32)
    places = np.arange(N, dtype=np.int32)
    return Sample(torch.zeros(N, 2), places // 20, places % 20, token)


def units(*columns: np.ndarray) -> Firings:
    return Firings(csc_matrix(np.stack(columns, 1).astype(np.float32)))


def test_a_unit_of_few_tokens_is_named_by_them_and_one_of_places_is_not(sample: Sample):
    cats, sun = np.isin(sample.token, [0, 1]), sample.token == 5
    places = sample.offset == 7
    rare = np.zeros(N)
    rare[:5] = 1
    strong = 1 + np.random.default_rng(1).random(N)
    found = read_units("planted", units(cats * strong, sun * strong, places * strong, rare), sample, STRINGS)
    assert found.single.tolist() == [False, True, False]
    assert found.score[:2].tolist() == [1, 1]
    assert 0.4 < found.score[2] < 0.6
    assert found.control[0] == pytest.approx(1 - 0.5 - 0.5 * sun[sample.block % 2 == 1].mean() / (1 - 0.25), abs=0.02)
    assert (found.live, found.dense) == (4, 0.75)
    assert found.scores(single=True).tolist() == [1]


def test_the_score_is_the_balanced_accuracy_of_the_name_on_the_other_half(sample: Sample):
    draw = np.random.default_rng(2)
    fires = (sample.token == 2) & (draw.random(N) < 0.6) | (draw.random(N) < 0.02)
    found = read_units("planted", units(fires * 1.0), sample, STRINGS)
    lower = np.array([text.strip().lower() for text in STRINGS])[sample.token]
    first, other = sample.block % 2 == 0, sample.block % 2 == 1
    words, counts = np.unique(lower[fires & first], return_counts=True)
    said = np.isin(lower, words[np.argsort(-counts)[:3]])
    wanted = (said[fires & other].mean() + (~said)[~fires & other].mean()) / 2
    assert found.score[0] == pytest.approx(wanted, abs=0.06)  # ties among the rare words may fall elsewhere
    assert found.control[0] == found.score[0]


def test_of_nothing_there_is_nothing_to_say(sample: Sample):
    found = read_units("silent", units(np.zeros(N)), sample, STRINGS)
    assert (found.live, found.dense, found.single_token, len(found.scores())) == (0, 0, 0, 0)
    assert np.isnan(difference(found.scores(), np.ones(3))[0])


def test_tokens_that_differ_in_case_and_spaces_are_one():
    assert variants(["a", " A", "b", " ", "  "]).tolist() == [0, 0, 1, 2, 3]


def test_a_difference_of_means_has_zero_in_its_interval_only_where_there_is_none():
    draw = np.random.default_rng(0)
    a, b = draw.normal(1, 1, 400), draw.normal(0, 1, 400)
    gain, low, high = difference(a, b)
    assert gain == pytest.approx(a.mean() - b.mean())
    assert low < gain < high
    assert low > 0.7
    assert difference(a, a)[1] < 0 < difference(a, a)[2]
