from types import SimpleNamespace

import numpy as np
import pytest
import torch

from sae_core.activations import Activations
from sae_core.corpus import Blocks, Corpus
from sae_core.dictionary import Dictionary
from sae_core.features import best_detectors


class World(SimpleNamespace):
    dictionary: Dictionary
    activations: Activations
    blocks: Blocks


@pytest.fixture
def opened(world: SimpleNamespace) -> World:
    return World(
        dictionary=Dictionary.load(world.dictionary),
        activations=Activations.open(world.activations, "held_out"),
        blocks=Corpus.open(world.corpus).held_out,
    )


def is_boilerplate(document: int) -> bool:
    return document % 4 == 0


def values_and_truth(opened: World, unit: str) -> tuple[np.ndarray, np.ndarray]:
    """Dense feature values of every token (or their maximum in every document), and whether each is positive."""
    values, documents = [], []
    for shard in opened.activations.shards():
        kept = ~shard.is_sink
        values.append(opened.dictionary.encode(shard.acts[kept]).numpy())
        documents.append(np.asarray(opened.blocks.documents)[shard.block[kept], shard.offset[kept]])
    all_values, all_documents = np.concatenate(values), np.concatenate(documents)
    if unit == "document":
        numbers = np.unique(all_documents)
        all_values = np.stack([all_values[all_documents == number].max(0) for number in numbers])
        all_documents = numbers
    return all_values, all_documents % 4 == 0


@pytest.mark.parametrize("unit", ["token", "document"])
def test_the_best_cut_of_each_feature_agrees_with_trying_every_threshold(opened: World, unit: str) -> None:
    found = best_detectors(
        opened.dictionary, opened.activations, opened.blocks, is_boilerplate, unit=unit, limit=24  # type: ignore[arg-type]
    )  # fmt: skip
    values, truth = values_and_truth(opened, unit)
    assert [d.f1 for d in found] == sorted((d.f1 for d in found), reverse=True)
    assert {d.feature for d in found} == set(range(24)) - {5}
    for detector in found:
        column = values[:, detector.feature]
        says = column[:, None] >= np.unique(column[column > 0])[None]
        hits = (says & truth[:, None]).sum(0)
        f1 = 2 * hits / (says.sum(0) + truth.sum())
        assert detector.f1 == pytest.approx(f1.max())
        # The encoder's sparse and dense values differ in the last bit, so the cut is checked a hair below.
        yes = column >= detector.threshold * (1 - 1e-5)
        assert detector.precision == pytest.approx((yes & truth).sum() / yes.sum())
        assert detector.recall == pytest.approx((yes & truth).sum() / truth.sum())


def test_a_planted_feature_is_found_first_with_full_precision_and_recall(opened: World) -> None:
    planted = opened.dictionary
    planted.threshold.fill_(1e9)
    planted.threshold[7] = 0.0
    planted.b_enc.fill_(0)
    planted.b_enc[7] = 1e6  # fires on everything, so precision is the share of positives and recall is 1
    (best,) = best_detectors(planted, opened.activations, opened.blocks, lambda document: True, limit=1)
    assert (best.feature, best.precision, best.recall) == (7, 1.0, 1.0)


def test_nothing_is_found_when_no_document_is_positive_or_no_feature_fires(opened: World) -> None:
    arguments = opened.activations, opened.blocks
    assert best_detectors(opened.dictionary, *arguments, lambda document: False) == []
    opened.dictionary.threshold = torch.full_like(opened.dictionary.threshold, 1e9)
    assert best_detectors(opened.dictionary, *arguments, lambda document: True) == []
