"""Digits, DNA and base64 in a made-up text, found by pattern and followed by their alphabets."""

import numpy as np
import pytest
import torch
from scipy.sparse import csc_matrix

from sae_core.corpus.packing import Blocks
from sae_core.science.firings import Firings, Sample
from sae_core.science.formal import FOREIGN, formal_kinds, standing_in, token_ratio

STRINGS = ["3", "14", " the", "GATT", "ACA", " cat", "\\xd0", "aGVsbG8gd29y", "bGQhIQ2yZm9v", "x7", "ACTION", " "]
TEXT = [
    [2, 0, 1, 2, 5, 9, 6, 10, 2, 5, 2, 5],
    [3, 4, 3, 4, 2, 11, 7, 8, 2, 2, 5, 0],
]


@pytest.fixture
def blocks() -> Blocks:
    ids = np.array(TEXT * 30, np.int32)
    return Blocks(ids, np.zeros_like(ids), np.tile(np.arange(12, dtype=np.int32), (60, 1)))


@pytest.fixture
def sample(blocks: Blocks) -> Sample:
    block, offset = (part.astype(np.int32) for part in np.divmod(np.random.default_rng(0).permutation(720), 12))
    return Sample(torch.zeros(720, 2), block, offset, blocks.token_ids[block, offset])


@pytest.mark.parametrize(("pattern", "tokens"), [
    (r"[0-9]+", {"3", "14"}),
    (r"[ACGT]{12,}", {"GATT", "ACA"}),
    (r"[A-Za-z0-9+/]{24,}", {"aGVsbG8gd29y", "bGQhIQ2yZm9v"}),
])  # fmt: skip
def test_tokens_stand_in_a_kind_when_all_their_characters_match(
    sample: Sample, blocks: Blocks, pattern: str, tokens: set[str]
):
    inside = standing_in(pattern, sample, blocks, STRINGS)
    assert {STRINGS[token] for token in sample.token[inside]} == tokens
    assert not inside[np.isin(sample.token, [6, 11])].any()  # half a character, and a space


def test_the_ratio_of_a_token_is_that_of_its_characters_to_its_frequency(sample: Sample):
    ratio = token_ratio("0123456789", sample, STRINGS)
    counts = np.bincount(sample.token, minlength=len(STRINGS)) + 0.5
    own = np.log(counts / counts.sum())
    assert ratio[1] == pytest.approx(2 * np.log(0.1) - own[1])
    assert ratio[9] == pytest.approx(np.log(FOREIGN) + np.log(0.1) - own[9])


def test_a_planted_feature_of_digits_is_found_and_rare_kinds_are_left_alone(sample: Sample, blocks: Blocks):
    digits, dna = np.isin(sample.token, [0, 1]), np.isin(sample.token, [3, 4])
    noise = np.random.default_rng(0).random(720)
    features = Firings(csc_matrix(np.stack([noise, digits * (1 + noise), dna * (1 + noise)], 1)))
    by_name = {one.kind.name: one for one in formal_kinds(sample, blocks, STRINGS, features, features)}
    assert by_name["digits"].features.feature == 1
    assert by_name["digits"].features.by_level == [1.0] * 5
    assert by_name["digits"].features.correlation > 0.7
    assert by_name["DNA"].tokens == dna.sum()
    few = sample.at(np.arange(60))
    rare = {one.kind.name: one for one in formal_kinds(few, blocks, STRINGS, features.at(np.arange(60)), features)}
    assert rare["DNA"].features is None
    assert 0 < rare["DNA"].tokens < 50
