"""Neurons read in a pass and correlated as sums, held against hooks and dense arithmetic."""

from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.sparse import csr_matrix
from torch import nn

from sae_core.corpus import Corpus
from sae_core.language_model import LanguageModel
from sae_core.pretrained import ModelError
from sae_core.science.firings import Firings, Sample, random_directions
from sae_core.science.neurons import CorrelationSums, layers_before, neuron_acts, neurons
from sae_core.sites import find_neurons
from sae_core.study import ActivationSettings
from tests.sae_core.science.conftest import WHERE

D_MODEL, D_MLP = 8, 20


def layer(*parts: nn.Module) -> nn.Module:
    """A decoder layer with the given parts in its MLP."""
    whole, mlp = nn.Module(), nn.Module()
    for number, part in enumerate(parts):
        mlp.add_module(f"part{number}", part)
    whole.add_module("mlp", mlp)
    return whole


class Conv1D(nn.Module):
    """As GPT-2 has it: the weight the other way around."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.weight = nf, nn.Parameter(torch.zeros(nx, nf))


def test_neurons_are_what_the_last_matrix_of_an_mlp_reads():
    gate, up, down = nn.Linear(D_MODEL, D_MLP), nn.Linear(D_MODEL, D_MLP), nn.Linear(D_MLP, D_MODEL)
    assert find_neurons(layer(gate, up, down, nn.SiLU()), D_MODEL) == (down, "input")
    back = Conv1D(D_MODEL, D_MLP)
    assert find_neurons(layer(Conv1D(D_MLP, D_MODEL), back), D_MODEL) == (back, "input")
    opt, fc2 = nn.Module(), nn.Linear(D_MLP, D_MODEL)
    opt.add_module("fc1", nn.Linear(D_MODEL, D_MLP))
    opt.add_module("fc2", fc2)
    assert find_neurons(opt, D_MODEL) == (fc2, "input")


def test_a_mixture_of_experts_has_no_neurons_of_its_own():
    experts = nn.ModuleList([layer(nn.Linear(D_MODEL, D_MLP), nn.Linear(D_MLP, D_MODEL))])
    with pytest.raises(ModelError, match="no neurons of its own"):
        find_neurons(layer(nn.Linear(D_MODEL, 4), experts), D_MODEL)


def test_correlations_from_sums_are_those_of_whole_arrays():
    draw = np.random.default_rng(0)
    x = np.where(draw.random((300, 6)) < 0.2, draw.random((300, 6)), 0)
    x[:, 5] = 0
    arrays = [draw.normal(size=(300, width)) + 3 for width in (4, 7)]
    arrays[1][:, 2] = -2 * x[:, 1] + 0.1 * arrays[1][:, 2]
    arrays[1][:, 3] = 1.5
    sums = CorrelationSums(csr_matrix(x))
    for rows in np.array_split(draw.permutation(300), 5):
        sums.add(rows, [torch.from_numpy(array[rows]) for array in arrays])
    for array, found in zip(arrays, sums.largest(), strict=True):
        for feature in range(5):
            r = [abs(np.corrcoef(x[:, feature], column)[0, 1]) for column in array.T if column.std() > 0]
            assert found[feature] == pytest.approx(max(r), abs=1e-5)
        assert found[5] == 0
    assert sums.largest()[1][1] > 0.8


@pytest.mark.parametrize(("hook", "layers"), [
    ("resid_post", [0, 1, 2]), ("mlp_out", [0, 1, 2]), ("resid_pre", [0, 1]), ("mlp_in", [0, 1]), ("attn_out", [0, 1]),
])  # fmt: skip
def test_the_layers_before_a_site_are_those_that_add_to_it(hook: str, layers: list[int]):
    assert layers_before(ActivationSettings.model_validate({"hook": hook, "layer": 2})) == layers


@pytest.fixture(scope="module")
def sample(site: Path) -> Sample:
    return Sample.of(site, 1500)


def test_neurons_of_a_sample_are_those_of_each_document_alone(lm: LanguageModel, text: Path, sample: Sample):
    blocks = Corpus.open(text).train
    found = {int(row): acts[1][i] for rows, acts in neuron_acts(lm, WHERE, sample, blocks, [0, 1], 0)
             for i, row in enumerate(rows)}  # fmt: skip
    assert sorted(found) == list(range(1500))
    for row in (0, 700, 1499):
        document = blocks.documents[sample.block[row]]
        own = document == document[sample.offset[row]]
        ids = torch.from_numpy(blocks.token_ids[sample.block[row]][own])[None].long()
        seen: list[torch.Tensor] = []
        mlp = lm.model.model.layers[1].mlp
        handle = mlp.down_proj.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        lm.model(ids)
        handle.remove()
        assert torch.allclose(found[row], seen[0][0, sample.offset[row] - int(np.argmax(own))], atol=1e-4)


def test_a_feature_that_is_a_neuron_is_found_to_be_one(lm: LanguageModel, text: Path, sample: Sample):
    blocks = Corpus.open(text).train
    planted = np.zeros(1500, np.float32)
    for rows, acts in neuron_acts(lm, WHERE, sample, blocks, [0], 0):
        planted[rows] = np.abs(acts[0][:, 9].numpy())
    planted[planted < np.quantile(planted, 0.7)] = 0
    directions = Firings.of(random_directions(12, 4, sample), sample)
    values = directions.values.tolil()
    values[:, 3] = planted[:, None] * np.sign(planted.sum())
    features = Firings(values.tocsc())
    found = neurons(lm, WHERE, sample, blocks, features, directions, k=4, most=12)
    assert (found.layers, found.number) == (2, 2 * 64)
    assert len(found.features.neuron) == len(found.shuffled.neuron) == 12
    assert found.features.neuron.max() > 0.4
    assert found.shuffled.neuron.max() < 0.3
    assert found.firings.counts.sum() / 1500 == pytest.approx(4, abs=0.1)
