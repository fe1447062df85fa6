import json
import random
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from sae_core.corpus import Corpus, CorpusError, build_corpus
from sae_core.corpus.build import is_held_out, shuffled, text_digest
from sae_core.corpus.documents import Document
from sae_core.study import CorpusSettings, ModelSettings


def build(model: Path, folder: Path, *sources: Any, **settings: Any) -> tuple[dict[str, Any], Corpus]:
    folder.mkdir(exist_ok=True)
    entries = [{"source": str(source)} if isinstance(source, Path) else source for source in sources]
    defaults = {"name": "test", "tokens": 100_000, "block_tokens": 32, "held_out": 0.2}
    corpus = CorpusSettings(sources=entries, **(defaults | settings))
    return build_corpus(corpus, ModelSettings(source=str(model)), folder), Corpus.open(folder)


def jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def numbered(words: str, count: int) -> list[str]:
    return [f"Document {i} of those that tell about {words}." for i in range(count)]


def tokens_by_document(corpus: Corpus) -> Iterator[tuple[int, list[int]]]:
    """Every document's tokens, gathered one place at a time from both splits."""
    for blocks in (corpus.train, corpus.held_out):
        found: dict[int, list[int]] = {}
        flat = (array.ravel().tolist() for array in blocks)
        for token, document, position in zip(*flat, strict=True):
            if document >= 0:
                assert position == len(found.setdefault(document, []))
                found[document].append(token)
        yield from found.items()


def test_every_document_is_in_the_blocks_as_its_tokens(tiny_model: Path, text_folder: Path, tmp_path: Path) -> None:
    summary, corpus = build(tiny_model, tmp_path, text_folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    table = corpus.documents().to_pylist()
    assert sorted(row["text"] for row in table) == sorted(file.read_text() for file in text_folder.iterdir())
    assert [row["document"] for row in table] == list(range(60))
    found = dict(tokens_by_document(corpus))
    for row in table:
        assert found[row["document"]] == tokenizer.encode(row["text"], add_special_tokens=False)
        assert row["n_tokens"] == len(found[row["document"]])
        assert corpus.text(row["document"]) == row["text"]
    assert summary["documents"] == 60
    assert summary["tokens"] == sum(row["n_tokens"] for row in table)


def test_the_splits_share_no_document_and_the_summary_counts_them(
    tiny_model: Path, text_folder: Path, tmp_path: Path
) -> None:
    summary, corpus = build(tiny_model, tmp_path, text_folder)
    table = corpus.documents().to_pylist()
    for split, blocks in (("train", corpus.train), ("held_out", corpus.held_out)):
        assert {d for d in np.unique(blocks.documents) if d >= 0} == {
            row["document"] for row in table if row["split"] == split
        }
    held_out = [row for row in table if row["split"] == "held_out"]
    assert summary["documents_held_out"] == len(held_out)
    assert summary["tokens_held_out"] == sum(row["n_tokens"] for row in held_out)
    assert summary["n_blocks"] == len(corpus.train.token_ids) + len(corpus.held_out.token_ids)
    assert summary["n_blocks_held_out"] == len(corpus.held_out.token_ids)
    assert summary["short_by"] == 100_000 - summary["tokens"]
    assert json.loads(json.dumps(summary)) == summary


def test_the_same_settings_give_the_same_bytes_and_another_seed_another_order(
    tiny_model: Path, text_folder: Path, tmp_path: Path
) -> None:
    names = ("documents.parquet", "train.safetensors", "held_out.safetensors", "skipped.json")

    def checksums(folder: str, seed: int) -> list[int]:
        build(tiny_model, tmp_path / folder, text_folder, seed=seed)
        return [zlib.crc32((tmp_path / folder / name).read_bytes()) for name in names]

    first = checksums("first", 0)
    (tmp_path / "killed").mkdir()
    (tmp_path / "killed" / "documents.parquet.tmp").write_bytes(b"half")
    assert checksums("killed", 0) == first
    assert checksums("other", 1)[:3] != first[:3]


def test_the_budget_is_filled_exactly_and_by_weight(tiny_model: Path, tmp_path: Path) -> None:
    sources = [
        {"source": str(jsonl(tmp_path / f"{name}.jsonl", numbered(name, 400))), "weight": weight}
        for name, weight in (("rivers", 3), ("stars", 1))
    ]
    summary, _ = build(tiny_model, tmp_path / "out", *sources, tokens=6000)
    assert (summary["tokens"], summary["short_by"]) == (6000, 0)
    rivers, stars = (source["tokens"] for source in summary["sources"])
    assert rivers + stars == 6000
    assert abs(rivers - 3 * stars) < 200  # a document is about 30 tokens


def test_a_source_that_runs_dry_leaves_its_share_to_the_others_in_proportion(tiny_model: Path, tmp_path: Path) -> None:
    sizes = {"few": (5, 10), "rivers": (400, 2), "stars": (400, 1)}
    sources = [
        {"source": str(jsonl(tmp_path / f"{name}.jsonl", numbered(name, count))), "weight": weight}
        for name, (count, weight) in sizes.items()
    ]
    summary, _ = build(tiny_model, tmp_path / "out", *sources, tokens=6000)
    few, rivers, stars = summary["sources"]
    assert few["documents"] == 5
    assert abs(rivers["tokens"] - 2 * stars["tokens"]) < 200
    assert summary["tokens"] == 6000


def test_duplicates_over_all_sources_are_dropped_and_counted(tiny_model: Path, tmp_path: Path) -> None:
    texts = numbered("bridges", 40)
    same = [text.upper().replace(" ", " \n\t") for text in texts]
    a, b = jsonl(tmp_path / "a.jsonl", texts), jsonl(tmp_path / "b.jsonl", [*same, *numbered("islands", 3)])
    summary, corpus = build(tiny_model, tmp_path / "out", a, b)
    assert (summary["documents"], summary["duplicates"]) == (43, 40)
    digests = Counter(text_digest(row["text"]) for row in corpus.documents().to_pylist())
    assert set(digests.values()) == {1}


def test_short_documents_are_dropped_and_counted_and_long_ones_cut(tiny_model: Path, tmp_path: Path) -> None:
    texts = [*numbered("lakes", 30), "short", " " * 100, "A very long story. " * 500]
    summary, corpus = build(tiny_model, tmp_path / "out", jsonl(tmp_path / "t.jsonl", texts), max_document_tokens=64)
    assert summary["too_short"] == 2
    (long,) = (row for row in corpus.documents().to_pylist() if row["text"].startswith("A very"))
    assert long["n_tokens"] == 64
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    assert tokenizer.decode(dict(tokens_by_document(corpus))[long["document"]]) == long["text"]


def test_fifty_megabytes_on_one_line_cost_no_more_than_what_is_kept(tiny_model: Path, tmp_path: Path) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "long.txt").write_text("word " * 10_000_000)
    jsonl(texts / "t.jsonl", [*numbered("lakes", 30), "talk " * 10_000_000])
    summary, _ = build(tiny_model, tmp_path / "out", texts, max_document_tokens=100)
    assert summary["documents"] == 32
    assert summary["sources"][0]["characters"] < 30 * 60 + 2 * 1600


def test_what_cannot_be_read_is_counted_and_listed(tiny_model: Path, text_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "latin.txt").write_bytes(b"\xe9")
    jsonl(tmp_path / "texts" / "t.jsonl", numbered("lakes", 30))
    summary, _ = build(tiny_model, tmp_path / "out", tmp_path / "texts")
    assert summary["skipped"] == 1
    assert json.loads((tmp_path / "out" / "skipped.json").read_text())[0]["file"] == "latin.txt"


def test_text_that_spells_a_special_token_is_text(tiny_model: Path, tmp_path: Path) -> None:
    texts = [f"{text} <|end|> <|start|>" for text in numbered("keys", 20)]
    _, corpus = build(tiny_model, tmp_path / "out", jsonl(tmp_path / "t.jsonl", texts))
    special = set(AutoTokenizer.from_pretrained(tiny_model).all_special_ids)
    used = {token for _, token_ids in tokens_by_document(corpus) for token in token_ids}
    assert special
    assert not special & used


def test_a_model_that_begins_sequences_with_a_token_gets_it_at_every_document(tiny_model: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    path = tmp_path / "model"
    tokenizer.save_pretrained(path)
    (path / "config.json").write_text((tiny_model / "config.json").read_text())
    content = json.loads((path / "tokenizer.json").read_text())
    start = tokenizer.convert_tokens_to_ids("<|start|>")
    piece = {"SpecialToken": {"id": "<|start|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    content["post_processor"] = {
        "type": "TemplateProcessing", "single": list(piece), "pair": list(piece),
        "special_tokens": {"<|start|>": {"id": "<|start|>", "ids": [start], "tokens": ["<|start|>"]}},
    }  # fmt: skip
    (path / "tokenizer.json").write_text(json.dumps(content))
    config = json.loads((path / "tokenizer_config.json").read_text()) | {"bos_token": "<|start|>"}
    (path / "tokenizer_config.json").write_text(json.dumps(config))

    texts = jsonl(tmp_path / "t.jsonl", [*numbered("doors", 20), "A very long story. " * 50])
    _, corpus = build(path, tmp_path / "out", texts, max_document_tokens=48)
    for blocks in (corpus.train, corpus.held_out):
        pieces = np.diff(blocks.documents, axis=1, prepend=-2) != 0
        starts = pieces & (blocks.documents >= 0)
        assert (blocks.token_ids[starts] == start).all()
        assert (blocks.positions[starts] == 0).all()
        assert (blocks.token_ids[~starts] != start).all()
    assert max(corpus.documents().column("n_tokens").to_pylist()) == 48


@pytest.mark.parametrize(
    ("texts", "settings", "message"),
    [
        ([], {}, "has no document"),
        (["too short"], {}, "at least 40 characters"),
        (numbered("seas", 1), {}, "none fell to"),
        (numbered("seas", 30), {"held_out": 1 - 1e-9}, "none fell to the train split"),
    ],
)
def test_a_corpus_of_nothing_is_refused(
    tiny_model: Path, tmp_path: Path, texts: list[str], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(CorpusError, match=message):
        build(tiny_model, tmp_path / "out", jsonl(tmp_path / "t.jsonl", texts), **settings)


def test_a_source_that_gives_nothing_is_refused_though_another_fills_the_budget(
    tiny_model: Path, text_folder: Path, tmp_path: Path
) -> None:
    wrong = {"source": str(jsonl(tmp_path / "t.jsonl", numbered("seas", 30))), "text_field": "body"}
    with pytest.raises(CorpusError, match=r"t\.jsonl has no document .*no text under the key 'body'"):
        build(tiny_model, tmp_path / "out", text_folder, wrong, tokens=1000)
    assert not list((tmp_path / "out").iterdir())


def test_progress_counts_tokens_up_to_the_budget(tiny_model: Path, text_folder: Path, tmp_path: Path) -> None:
    heard: list[tuple[int, int, str]] = []
    settings = CorpusSettings(name="t", sources=[{"source": str(text_folder)}], tokens=500, held_out=0.5)
    build_corpus(
        settings, ModelSettings(source=str(tiny_model)), tmp_path,
        lambda done, total, unit, **values: heard.append((done, total, unit)),
    )  # fmt: skip
    assert heard == sorted(heard)
    assert heard[-1] == (500, 500, "tokens")


def test_a_document_beyond_the_last_is_an_index_error(tiny_model: Path, text_folder: Path, tmp_path: Path) -> None:
    _, corpus = build(tiny_model, tmp_path, text_folder)
    for document in (-1, 60, 100_000):
        with pytest.raises(IndexError):
            corpus.text(document)


def test_whether_a_document_is_held_out_hangs_on_its_text_and_the_seed_alone() -> None:
    digests = [text_digest(f"text {i}") for i in range(4000)]
    small = {d for d in digests if is_held_out(d, 0, 0.1)}
    large = {d for d in digests if is_held_out(d, 0, 0.3)}
    assert 300 < len(small) < 500
    assert small < large
    assert small != {d for d in digests if is_held_out(d, 1, 0.1)}
    assert not any(is_held_out(d, 0, 0.0) for d in digests)
    assert all(is_held_out(d, 0, 1.0) for d in digests)


@given(st.lists(st.text(max_size=30), max_size=50), st.integers(0, 200), st.integers(0, 3))
def test_shuffling_loses_nothing_and_holds_no_more_than_its_window(texts: list[str], window: int, seed: int) -> None:
    documents = [Document(text, str(i), "", "", "", "") for i, text in enumerate(texts)]
    waiting: list[int] = []
    taken = 0

    def feed() -> Iterator[Document]:
        nonlocal taken
        for document in documents:
            taken += len(document.text)
            yield document

    out = []
    for document in shuffled(feed(), random.Random(seed), window):
        taken -= len(document.text)
        out.append(document)
        waiting.append(taken)
    assert sorted(out) == sorted(documents)
    assert all(held <= window + 30 for held in waiting)
