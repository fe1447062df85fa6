"""Against regular expressions over every text, one after another."""

import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sae_core import word_index
from sae_core.artifacts import ArtifactStore, Recipe
from sae_core.word_index import WordIndex, terms

SLUG = "tiny-llama.resid_post.L01.mini.batch_top_k.w8.k2"
EXAMPLES = [
    [["The", " Golden", " Gate\n Bridge"], ["gates of gold; bridged"]],
    [["don't, won't"], ["c++ and c#", " snake_case"]],
    [["École d'été 2024"], ["Мост через реку"], ["ΟΔΟΣ οδός"]],
    [["東京の橋と日本語"], ["abc橋 and 橋abc"], ["ถนนสาย"]],
    [["50% of 1,850"], ["\0null\0byte", " \\xe2"], ["<b>bold</b>"]],
    [["golden  golden gate gate"], ["a golden\tgate"], [""]],
    [],
]
LABELS = ["Golden Gate Bridge", "", "schools", "bridges in Japanese", "numbers", "", None]
QUERIES = [
    "golden", "GOLDEN gate", "gate bridge", "gate golden", "ridge", "bri", "don't", "c++", "c#", "snake_case", "case",
    "école", "2024", "20", "мост", "οδοσ", "橋", "日本", "の橋", "abc", "abc橋", "橋abc", "สาย", "50%", "%", "1,850",
    "850", "null", "<b>", "b>bold", "\\", "'", "of", "zebra", "a golden gate", "\U0010ffff", "日 本",
]  # fmt: skip


def write(folder: Path) -> None:
    n = len(EXAMPLES)
    tokens = [[f" w{i}", "Gate"] for i in range(n)]
    pq.write_table(pa.table({"feature": range(n), "promoted": tokens, "top_tokens": tokens}),
                   folder / "features.parquet")  # fmt: skip
    rows = [(i, text) for i, texts in enumerate(EXAMPLES) for text in texts]
    pq.write_table(pa.table({"feature": [i for i, _ in rows], "tokens": [text for _, text in rows]}),
                   folder / "examples.parquet")  # fmt: skip


def write_labels(folder: Path, labels: list[Any]) -> None:
    columns = {"feature": range(len(labels)), "label": labels, "description": [""] * len(labels)}
    pq.write_table(pa.table(columns | {"lexical": [f"fires on {i}" for i in range(len(labels))]}),
                   folder / "labels.parquet")  # fmt: skip


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    store = ArtifactStore(tmp_path / "it's here")
    store.make(Recipe("features", SLUG, 1, {}), lambda draft: write(draft.folder) or {})
    store.make(Recipe("labels", SLUG, 1, {}), lambda draft: write_labels(draft.folder, LABELS) or {})
    return store


def texts() -> dict[str, list[tuple[int, str]]]:
    tokens = [(i, text) for i in range(len(EXAMPLES)) for text in (f" w{i}", "Gate")]
    return {
        "label": [(i, label) for i, label in enumerate(LABELS) if label],
        "lexical label": [(i, f"fires on {i}") for i in range(len(LABELS))],
        "promoted token": tokens,
        "top token": tokens,
        "example": [(i, "".join(x)) for i, of in enumerate(EXAMPLES) for x in of if "".join(x)],
    }


def matches(term: str) -> dict[str, dict[int, list[str]]]:
    """Field, feature and matching texts, by a pattern over all of them."""
    spaced = term[0].isalnum() and ord(term[0]) < 0x0E00
    pattern = (r"(?<![^\W_])" if spaced else "") + r"\s+".join(map(re.escape, term.split()))
    found: dict[str, dict[int, list[str]]] = {}
    for field, rows in texts().items():
        for feature, text in rows:
            if re.search(pattern, text, re.IGNORECASE):
                found.setdefault(field, {}).setdefault(feature, []).append(text)
    return found


@pytest.mark.parametrize("few", [False, True])
def test_a_term_is_found_where_a_pattern_finds_it(
    store: ArtifactStore, few: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if few:
        monkeypatch.setattr(word_index, "_BATCH", 2048)  # the least that DuckDB hands over at once
    index = WordIndex.open(store, SLUG)
    for query in QUERIES:
        for term in terms(query):
            found = index.find(term)
            told = {f.field: dict(zip(f.features.tolist(), f.counts.tolist(), strict=True)) for f in found}
            wanted = matches(term)
            assert told == {field: {i: len(x) for i, x in of.items()} for field, of in wanted.items()}, term
            for part in found:
                for place, feature in enumerate(part.features.tolist()):
                    assert index.first_text(part, place) == min(wanted[part.field][feature]), term


def test_an_index_is_made_once_and_again_when_labels_are(store: ArtifactStore) -> None:
    home = store.root / "search" / SLUG
    WordIndex.open(store, SLUG)
    (first,) = (path for path in home.iterdir() if path.is_dir())
    made = (first / "index.json").stat().st_mtime_ns
    old = WordIndex.open(store, SLUG)
    assert (first / "index.json").stat().st_mtime_ns == made
    new = [*LABELS[:-1], "zebra crossings"]
    store.make(Recipe("labels", SLUG, 2, {}), lambda draft: write_labels(draft.folder, new) or {})
    assert [f.features.tolist() for f in WordIndex.open(store, SLUG).find("zebra")] == [[6]]
    assert not first.exists()
    assert old.find("zebra") == []  # whoever reads the old one goes on reading it
    assert old.text(0) == "Golden Gate Bridge"


def test_what_a_killed_process_left_is_no_index(store: ArtifactStore) -> None:
    WordIndex.open(store, SLUG)
    (made,) = (path for path in (store.root / "search" / SLUG).iterdir() if path.is_dir())
    made.rename(made.with_name(f"{made.name}.draft"))
    (made.with_name(f"{made.name}.draft") / "index.json").unlink()
    assert WordIndex.open(store, SLUG).find("golden")
    assert [path.name for path in made.parent.iterdir() if path.is_dir()] == [made.name]


def test_very_common_terms_are_cut_short(store: ArtifactStore, monkeypatch: pytest.MonkeyPatch) -> None:
    index = WordIndex.open(store, SLUG)
    monkeypatch.setattr(word_index, "MAX_COMPARED", 1)
    assert index.is_common("golden gate")
    assert not index.is_common("gate bridge zebra")
    assert not index.is_common("golden")
    monkeypatch.setattr(word_index, "MAX_BEGINNINGS", 1)
    assert [f.field for f in index.find("bri")] == []  # no text holds the very word
    assert [f.field for f in index.find("bridge")] == ["label", "example"]
