"""Features of one dictionary found again in another."""

import numpy as np
import pytest
import torch

from sae_core.dictionary import Dictionary
from sae_core.lineage import KEPT, LineageError, lineage

D_MODEL, D_SAE = 24, 40


def directions(n: int = D_SAE, seed: int = 0) -> torch.Tensor:
    return torch.nn.functional.normalize(torch.randn(n, D_MODEL, generator=torch.Generator().manual_seed(seed)), dim=1)


def dictionary(rows: torch.Tensor, threshold: float = 1.0) -> Dictionary:
    n = len(rows)
    config = {"architecture": "batch_top_k", "k": 4}
    return Dictionary(
        rows.T.clone(), torch.zeros(n), rows.clone(), torch.zeros(D_MODEL), torch.full((n,), threshold), config
    )


def activations(rows: torch.Tensor, n: int = 2000) -> list[torch.Tensor]:
    """Batches of tokens on which three features each fire."""
    draw = np.random.default_rng(0)
    chosen = torch.tensor(np.stack([draw.choice(len(rows), 3, replace=False) for _ in range(n)]))
    return list((rows[chosen] * torch.tensor(draw.uniform(2, 4, (n, 3, 1)), dtype=torch.float32)).sum(1).split(512))


def test_a_permuted_dictionary_keeps_every_feature_and_says_where_it_went() -> None:
    rows, order = directions(), torch.randperm(D_SAE, generator=torch.Generator().manual_seed(1))
    lines = lineage(dictionary(rows), dictionary(rows[order]), activations(rows))
    assert [line.new for line in lines] == list(range(D_SAE))
    assert [line.old for line in lines] == order.tolist()
    assert {line.fate for line in lines} == {"kept"}
    assert min(line.cosine for line in lines) == pytest.approx(1)
    assert min(line.correlation for line in lines) == pytest.approx(1)


def test_correlations_are_those_of_the_dense_activations() -> None:
    rows = directions()
    near = torch.nn.functional.normalize(rows + 0.1 * directions(seed=5), dim=1)
    old, new, batches = dictionary(rows), dictionary(near), activations(rows)
    dense = [np.concatenate([d.encode(x).numpy() for x in batches]) for d in (new, old)]
    for line in lineage(old, new, batches):
        assert line.new is not None
        assert line.old is not None
        expected = np.corrcoef(dense[0][:, line.new], dense[1][:, line.old])[0, 1]
        assert line.correlation == pytest.approx(expected, abs=1e-4)


def test_features_that_are_like_none_are_born_and_those_that_none_is_like_have_died() -> None:
    rows = torch.eye(D_MODEL)
    lines = lineage(dictionary(rows[:12]), dictionary(rows[4:16]), activations(rows[:16]))
    fates = {(line.new, line.old): line.fate for line in lines}
    assert [old for (new, old), fate in fates.items() if fate == "died"] == [0, 1, 2, 3]
    assert [new for (new, old), fate in fates.items() if fate == "born"] == [8, 9, 10, 11]
    assert sum(fate == "kept" for fate in fates.values()) == 8


def test_of_two_heirs_one_is_matched_and_the_other_was_split_off_and_the_other_way_they_merge() -> None:
    rows = torch.eye(D_MODEL)[:8]
    tilt = torch.eye(D_MODEL)[20]
    heirs = torch.nn.functional.normalize(torch.stack([rows[0] + 0.3 * tilt, rows[0] - 0.5 * tilt]), dim=1)
    one, two = dictionary(rows), dictionary(torch.cat([heirs, rows[1:]]))
    split = [line for line in lineage(one, two, activations(rows)) if line.old == 0]
    assert [(line.new, line.fate) for line in split] == [(0, "kept"), (1, "split")]
    merged = [line for line in lineage(two, one, activations(rows)) if line.new == 0]
    assert [(line.old, line.fate) for line in merged] == [(0, "kept"), (1, "merged")]


def test_the_matching_is_one_to_one_and_every_feature_of_both_has_its_line() -> None:
    old, new = dictionary(directions()), dictionary(directions(50, seed=3))
    lines = lineage(old, new, activations(directions()))
    pairs = [(line.new, line.old) for line in lines if line.fate in {"kept", "moved"}]
    assert len({new for new, _ in pairs}) == len({old for _, old in pairs}) == len(pairs)
    assert {line.new for line in lines[:50]} == set(range(50))
    gone = {line.old for line in lines[50:]}
    assert gone | {old for _, old in pairs} == set(range(D_SAE))
    assert not gone & {old for _, old in pairs}


def test_same_direction_that_fires_on_other_tokens_is_not_kept() -> None:
    """A cosine of 1 alone is no identity: a second dictionary that fires on a tenth of the tokens is another thing."""
    rows = directions()
    lines = lineage(dictionary(rows, 1.0), dictionary(rows, 3.9), activations(rows))
    assert max(line.cosine for line in lines) == pytest.approx(1)
    assert np.mean([line.likeness < KEPT for line in lines if line.fate == "moved"]) == 1


def test_dictionaries_of_different_sites_are_refused() -> None:
    rows = directions()
    other = dictionary(rows)
    other.W_dec = other.W_dec[:, :8]
    with pytest.raises(LineageError, match="width 8 and 24"):
        lineage(other, dictionary(rows), [])
