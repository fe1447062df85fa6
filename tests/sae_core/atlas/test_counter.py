"""Counter-examples in a sample of eight windows, with token vectors whose meaning is planted."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from sae_core.atlas.counter import CounterExamples
from sae_core.features import Example, Features
from sae_core.features.reader import FeatureRow
from sae_core.features.windows import SCHEMA
from sae_core.labels.meaning import Meaning, write_index

RIVER, MONEY = ["river", "stream", "lake"], ["money", "coin", "euro"]
WINDOWS = [
    [" the", " river"], [" the", " stream"], [" a", " coin"], [" a", " lake"], [" the", " euro"], [" of", " a"],
    [" the", " rivers"], [" money", " of"],
]  # fmt: skip
FIRES = {0: [0, 2], 1: []}
"""The windows in which each feature fires."""


@pytest.fixture(scope="module")
def features(tmp_path_factory: pytest.TempPathFactory) -> Features:
    folder = tmp_path_factory.mktemp("features")
    for name in ("features", "examples"):
        pq.write_table(pa.table({"feature": [0]}), folder / f"{name}.parquet")
    pq.write_table(pa.table({"tokens": WINDOWS, "document": [10 * i for i in range(8)]}), folder / "windows.parquet")
    firings = [
        {"feature": feature, "window": window, "place": 1, "value": 1.0}
        for feature, its in FIRES.items() for window in its
    ]  # fmt: skip
    pq.write_table(pa.Table.from_pylist(firings, SCHEMA), folder / "firings.parquet")
    return Features.open(folder)


@pytest.fixture(scope="module")
def meaning(tmp_path_factory: pytest.TempPathFactory) -> Meaning:
    words = ["[UNK]", "the", "a", "of", *RIVER, *MONEY, *(f"filler{i}" for i in range(100))]
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(len(words), 64))
    for topic in (RIVER, MONEY):
        for word in topic[1:]:
            vectors[words.index(word)] = vectors[words.index(topic[0])] + 0.4 * rng.normal(size=64)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("labels")
    write_index(vectors.astype(np.float32), tokenizer, [[(word, 1.0)] for word in words[1:]], folder)
    found = Meaning.open(folder)
    assert found
    return found


def row(feature: int, *top_tokens: str) -> FeatureRow:
    return FeatureRow(feature, 9, 0.1, 1.0, 1.0, False, [], [], [], [], [], [*top_tokens], [0.5] * len(top_tokens))


def firing(*tokens: str) -> Example:
    return Example(0, 5, "top", 1.0, 0, 0, 1, [*tokens], [0.0, 1.0])


def test_texts_like_the_label_in_which_it_is_silent_come_first_and_those_in_which_it_fires_do_not(
    features: Features, meaning: Meaning
) -> None:
    found = CounterExamples(features, meaning).of(row(0, " river"), [], "lake and river", 2)
    assert found.by_label
    assert {x.document for x in found.silent} == {10, 30}  # stream and lake; the river's window fires
    assert all(
        x.tokens[x.peak] in (" stream", " lake") and x.kind == "silent" and not any(x.acts) for x in found.silent
    )


def test_examples_least_like_the_label_are_told(features: Features, meaning: Meaning) -> None:
    examples = [firing(" the", " stream"), firing(" a", " euro"), firing(" the", " lake")]
    (least,) = CounterExamples(features, meaning).of(row(0), examples, "river", 1).firing
    assert least is examples[1]


@pytest.mark.parametrize("label", ["", " "])
def test_without_a_label_that_means_anything_it_goes_by_the_tokens_that_it_fires_on(
    features: Features, meaning: Meaning, label: str
) -> None:
    examples = [firing(" a", " euro"), firing(" a", " coin")]
    found = CounterExamples(features, meaning).of(row(0, " coin", " the"), examples, label, 9)
    assert not found.by_label
    assert [(x.document, x.tokens[x.peak]) for x in found.silent] == [(10, " the"), (40, " the"), (60, " the")]
    assert found.firing == [examples[0]]


def test_without_an_index_of_meanings_it_goes_by_the_tokens_too(features: Features) -> None:
    assert not CounterExamples(features, None).of(row(1, " coin"), [], "money", 3).by_label


def test_without_a_sample_nothing_is_silent(tmp_path: Path, features: Features, meaning: Meaning) -> None:
    for path in (features.features_path, features.examples_path):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    bare = CounterExamples(Features.open(tmp_path), meaning)
    assert bare.of(row(0, " river"), [], "river", 3).silent == []
    assert bare.of(row(0, " river"), [], "", 3).silent == []
