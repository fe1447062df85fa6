"""First letters in planted activations: a probe that tells them, a feature of one, and one that absorbs it."""

import numpy as np
import pytest
import torch
from scipy.sparse import csc_matrix

from sae_core.dictionary import Dictionary
from sae_core.science.firings import Firings, Sample
from sae_core.science.letters import Probe, Words, absorption, main_features, probe, words

D_MODEL = 32


def test_words_begin_with_a_space_and_are_taken_a_few_times_each():
    strings = [" apple", "apple", " Bee", " b", " 12", " naïve", " apples"]
    token = np.array([0] * 30 + [1] * 5 + [2] * 4 + [3, 4, 5] + [6] * 12, np.int32)
    places = np.arange(len(token), dtype=np.int32)
    found = words(Sample(torch.zeros(len(token), 2), places, places, token), strings)
    assert np.bincount(token[found.rows], minlength=7).tolist() == [10, 0, 4, 0, 0, 0, 10]
    assert set(zip(token[found.rows].tolist(), found.letter.tolist(), strict=True)) == {(0, 0), (2, 1), (6, 0)}
    for one in (0, 2, 6):
        assert len(set(found.measured[token[found.rows] == one].tolist())) == 1  # a word is on one side


def planted(n: int = 1200) -> tuple[torch.Tensor, Words, torch.Tensor]:
    """Activations with a direction for each of four letters, on which one in five stands weakly; and the directions."""
    draw = np.random.default_rng(0)
    letter, measured = draw.integers(0, 4, n), draw.random(n) < 0.5
    directions = torch.linalg.qr(torch.randn(D_MODEL, 8, generator=torch.Generator().manual_seed(0))).Q.T
    x = 3 * directions[torch.from_numpy(letter)] + 0.2 * torch.randn(
        n, D_MODEL, generator=torch.Generator().manual_seed(1)
    )
    return x, Words(np.arange(n), letter, measured), directions


def test_the_probe_finds_the_directions_of_letters_and_none_where_letters_are_dealt_out():
    x, found, directions = planted()
    told = probe(x, found)
    assert told.f1[:4].min() > 0.95
    assert np.isnan(told.f1[4:]).all()
    centered = directions[:4] - directions[:4].mean(0)
    assert (torch.from_numpy(told.direction[:4]) * torch.nn.functional.normalize(centered, dim=1)).sum(1).min() > 0.8
    dealt = found._replace(letter=np.random.default_rng(1).permutation(found.letter))
    assert np.nanmax(probe(x, dealt).f1) < 0.45


def test_main_features_are_added_while_they_help():
    own = np.repeat([True, False], 100)
    fires = np.zeros((200, 4))
    fires[:60, 0] = fires[60:95, 1] = fires[95:97, 2] = fires[:, 3] = 1
    assert main_features(csc_matrix(fires), own, np.ones(200, bool)) == [0, 1]  # the third adds less than 0.03


def test_a_feature_that_stands_in_for_a_silent_one_is_counted_and_noise_is_not():
    x, found, directions = planted()
    told = Probe(directions[:4].numpy(), np.ones(len(x), bool), np.where(np.arange(26) < 4, 1.0, np.nan))
    of_letter = [found.letter == letter for letter in range(4)]
    taken = of_letter[0] & (np.random.default_rng(5).random(len(x)) < 0.04)  # more would make it a main feature
    acts = np.stack([3.0 * own for own in of_letter] + [3.0 * taken, 9.0 * taken], 1)
    acts[taken, 0] = 0
    rows = torch.cat([directions[:4], 0.8 * directions[:1] + 0.6 * directions[5:6], directions[6:7]])
    zeros = torch.zeros(6)
    one = Dictionary(rows.T.clone(), zeros, rows, torch.zeros(D_MODEL), zeros, {"architecture": "batch_top_k", "k": 1})
    result = absorption("planted", one, Firings(csc_matrix(acts)), x, found, told)
    places = found.measured.sum()
    assert (taken & found.measured).sum() > 2
    assert (result.letters, result.places) == (4, places)
    assert result.rate == pytest.approx((taken & found.measured).sum() / places, abs=1e-6)
    acts[:, 4] = 0  # now the odd one out points elsewhere
    assert absorption("none", one, Firings(csc_matrix(acts)), x, found, told).rate == 0
