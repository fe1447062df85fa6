"""Concepts in a made-up text: where they stand, which have a feature, and the curve of it."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from scipy.sparse import csc_matrix

from sae_core.corpus.packing import Blocks
from sae_core.science.coverage import (
    best_feature,
    concept_lists,
    likelihood_ratio,
    logistic,
    occurrences,
    proxy,
)
from sae_core.science.firings import Firings, Sample

STRINGS = [" a", " zinc", " ur", "anium", "s", ".", " the", " zin"]
IDS = {" zinc": [1], " uranium": [2, 3]}
TEXT = [0, 1, 5, 2, 3, 5, 1, 4, 2, 6, 3, 5] * 6
"""zinc once and once as the beginning of a longer word; ur-anium once, and once with a word between."""


@pytest.fixture
def blocks() -> Blocks:
    ids = np.array(TEXT, np.int32).reshape(6, 12)
    return Blocks(token_ids=ids, documents=np.zeros_like(ids), positions=np.tile(np.arange(12, dtype=np.int32), (6, 1)))


@pytest.fixture
def sample(blocks: Blocks) -> Sample:
    """All tokens of the blocks, shuffled as in a shard."""
    order = np.random.default_rng(0).permutation(blocks.token_ids.size)
    block, offset = (part.astype(np.int32) for part in np.divmod(order, 12))
    return Sample(torch.zeros(len(order), 2), block, offset, blocks.token_ids[block, offset])


def firings(columns: list[np.ndarray]) -> Firings:
    return Firings(csc_matrix(np.stack(columns, 1).astype(np.float32)))


def test_occurrences_are_whole_words_after_a_space_at_their_last_token(sample: Sample, blocks: Blocks):
    tokenizer = SimpleNamespace(encode=lambda text, add_special_tokens: IDS[text])
    found = occurrences({"elements": ["zinc", "uranium"]}, sample, blocks, tokenizer, STRINGS)
    places = {c.name: sorted(zip(sample.block[c.rows], sample.offset[c.rows], strict=True)) for c in found}
    assert places == {"zinc": [(b, 1) for b in range(6)], "uranium": [(b, 4) for b in range(6)]}


def test_a_concept_has_the_feature_whose_strongest_tokens_are_its_own():
    rows = np.arange(10)
    exact, broad, half = np.zeros(200), np.random.default_rng(0).random(200), np.zeros(200)
    exact[:10], half[:6], half[20:28] = 2.0, 3.0, 2.0
    assert best_feature(rows, firings([broad, exact, half])) == (1, 1.0)
    number, share = best_feature(rows, firings([half]))
    assert (number, share) == (0, 0.6)
    assert best_feature(rows, firings([np.zeros(200)])) == (-1, 0.0)


def test_the_logistic_curve_crosses_a_half_where_it_was_made_to():
    frequency = np.geomspace(1e-6, 1e-2, 400)
    true = 1 / (1 + np.exp(-3 * (np.log10(frequency) + 4)))
    has = np.random.default_rng(0).random(400) < true
    found = logistic(frequency, has)
    assert found.half == pytest.approx(1e-4, rel=0.5)
    assert 1.5 < found.slope < 4.5
    assert found.loss < logistic(np.random.default_rng(1).permutation(frequency), has).loss


def test_a_feature_of_a_kind_of_text_follows_its_likelihood_ratio(sample: Sample, blocks: Blocks):
    inside = np.isin(sample.token, [2, 3])
    ratio = likelihood_ratio(inside, sample, blocks, len(STRINGS))
    assert (ratio >= 0).all()
    assert ratio[inside].min() > ratio[sample.token == 6].max()
    noise = np.random.default_rng(0).random(len(ratio))
    found = proxy("made up", inside, ratio, firings([noise, np.where(inside, 1 + noise, 0)]))
    assert (found.feature, found.purity, found.by_level) == (1, 1.0, [1.0] * 5)
    assert found.correlation == pytest.approx(np.corrcoef(ratio, np.where(inside, 1 + noise, 0))[0, 1], abs=1e-5)


def test_the_lists_hold_single_words_each_once():
    lists = concept_lists()
    assert set(lists) == {"elements", "countries", "cities", "animals", "foods", "boroughs"}
    for kind, names in lists.items():
        assert len(set(names)) == len(names) > 20, kind
        assert all(name.isalpha() for name in names), kind
