"""Names searched by meaning, with token vectors whose meaning is planted."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from sae_core.features import Features
from sae_core.labels import meaning
from sae_core.labels.meaning import LEAST, Meaning, write_index
from sae_core.labels.reader import LabelRow

TOPICS = {
    "money": ["dollars", "euro", "coin"],
    "river": ["stream", "water", "lake"],
    "war": ["army", "battle", "siege"],
}
NAMES = ["dollars coin", "stream", "", "army siege", "the lake", "the", "unheard-of"]
NAMED = [[(name, 1.0)] if name else [] for name in [*NAMES, *(f"the filler{i}" for i in range(100))]]


def planted_vectors(vocabulary: dict[str, int]) -> np.ndarray:
    """Vectors that lie near their topic's; the others anywhere."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(len(vocabulary), 64))
    for topic, words in TOPICS.items():
        for word in words:
            rows[vocabulary[word]] = rows[vocabulary[topic]] + 0.5 * rng.normal(size=64)
    return rows.astype(np.float32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    words = ["[UNK]", "the", *TOPICS, *(word for group in TOPICS.values() for word in group)]
    words += [f"filler{i}" for i in range(200)]
    vocabulary = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    folder = tmp_path_factory.mktemp("labels")
    write_index(planted_vectors(vocabulary), tokenizer, NAMED, folder)
    return folder


@pytest.fixture(scope="module")
def index(folder: Path) -> Meaning:
    found = Meaning.open(folder)
    assert found
    return found


@pytest.mark.parametrize(("query", "feature"), [("money", 0), ("river", 1), ("war", 3), ("euro", 0), ("  battle ", 3)])
def test_a_name_is_found_by_a_word_that_is_not_in_it(index: Meaning, query: str, feature: int) -> None:
    cosines, found = index.find(query)
    assert found[0] == feature
    assert cosines[0] > LEAST
    assert list(cosines) == sorted(cosines, reverse=True)


def test_a_word_in_most_names_counts_less_than_a_rare_one(index: Meaning) -> None:
    _, found = index.find("the water")
    assert set(found[:2]) == {1, 4}
    assert 5 not in found[:2]


@pytest.mark.parametrize("query", ["", "   ", "\n\t"])
def test_a_blank_query_finds_nothing(index: Meaning, query: str) -> None:
    cosines, found = index.find(query)
    assert len(cosines) == len(found) == 0


@pytest.mark.parametrize("query", ["\0", "\ud800", "<script>", "%" * 500, "日本語"])
def test_hard_queries_find_what_was_not_understood_either(index: Meaning, query: str) -> None:
    assert index.find(query)[1][0] == NAMES.index("unheard-of")  # by the token of all that is unknown


def test_a_feature_without_a_name_is_never_found(index: Meaning) -> None:
    everything = {int(i) for words in TOPICS.values() for word in [*words, "the"] for i in index.find(word)[1]}
    assert 2 not in everything
    assert len(everything) > 3


def test_no_more_are_found_than_asked(index: Meaning) -> None:
    assert len(index.find("water", limit=1)[1]) == 1


def test_labels_without_an_index_have_none(tmp_path: Path) -> None:
    assert Meaning.open(tmp_path) is None


def test_two_indices_of_the_same_names_are_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(str(folder / meaning.TOKENIZER))
    write_index(planted_vectors(tokenizer.get_vocab()), tokenizer, NAMED, tmp_path)
    for name in (meaning.INDEX, meaning.VECTORS, meaning.TOKENIZER):
        assert (tmp_path / name).read_bytes() == (folder / name).read_bytes()


def test_a_written_label_stands_in_place_of_the_tokens(tmp_path: Path) -> None:
    columns = {
        "top_tokens": [[" War", "war", "\\xd0", " "], ["x"]],
        "top_token_shares": [[0.5, 0.25, 0.2, 0.05], [1.0]],
    }
    for name in ("features.parquet", "examples.parquet"):
        pq.write_table(pa.table(columns), tmp_path / name)
    rows = [LabelRow(0), LabelRow(1, label="letters")]
    assert meaning.names(Features.open(tmp_path), rows) == [[("war", 0.75)], [("letters", 1.0)]]
