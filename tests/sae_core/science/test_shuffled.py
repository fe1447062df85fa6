"""The model with shuffled weights: the same entries in another order, on the same text."""

from pathlib import Path

import torch

from sae_core.activations import Activations
from sae_core.language_model import LanguageModel
from sae_core.science.shuffled import first_shards, shuffled_model
from sae_core.study import ModelSettings


def test_each_matrix_keeps_its_entries_and_loses_their_order(tiny_model: Path, tmp_path: Path, lm: LanguageModel):
    found = LanguageModel.load(shuffled_model(ModelSettings(source=str(tiny_model)), "float32", tmp_path / "a", 0))
    before = dict(lm.model.named_parameters())
    for name, weight in found.model.named_parameters():
        own = before[name].to(weight.dtype)
        assert torch.equal(weight.flatten().sort().values, own.flatten().sort().values), name
        assert torch.equal(weight, own) == (weight.dim() == 1), name
    again = LanguageModel.load(shuffled_model(ModelSettings(source=str(tiny_model)), "float32", tmp_path / "b", 0))
    other = LanguageModel.load(shuffled_model(ModelSettings(source=str(tiny_model)), "float32", tmp_path / "c", 1))
    ids = torch.arange(9)[None]
    assert torch.equal(found.logits(ids), again.logits(ids))
    assert not torch.equal(found.logits(ids), other.logits(ids))
    assert found.tokenizer("a b").input_ids == lm.tokenizer("a b").input_ids


def test_the_first_shards_hold_as_much_text_as_was_asked_for(source: Activations):
    some = first_shards(source, 1500)
    assert some.paths == source.paths[:2]
    assert some.n_kept < source.n_kept
    assert first_shards(source, 10**9).paths == source.paths
