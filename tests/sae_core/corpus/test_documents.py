import gzip
import json
import sys
import tracemalloc
import zipfile
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sae_core.artifacts import file_sha256
from sae_core.catalog_entries import TEXTS, Archive, TextEntry
from sae_core.corpus import CorpusError, documents
from sae_core.corpus.documents import Document, Skipped, read_documents
from sae_core.errors import MindAtlasError
from sae_core.made_texts import dna
from sae_core.study import Source


def read(path: Path | str, characters: int = 1000, **settings: Any) -> tuple[list[str], list[dict[str, str]]]:
    skipped = Skipped()
    found = list(read_documents(Source(source=str(path), **settings), characters, skipped))
    return [document.text for document in found], skipped.listed


def test_a_folder_is_read_in_order_of_its_names_whatever_the_endings(tmp_path: Path) -> None:
    for name in ("b.md", "a.txt", "sub/c.py", "no-ending"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / ".hidden").write_text("hidden")
    assert read(tmp_path) == (["a.txt", "b.md", "no-ending", "sub/c.py"], [])


def test_what_is_no_utf8_is_skipped_and_listed(tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("café".encode("latin-1"))
    (tmp_path / "utf16.txt").write_text("word", "utf-16")
    (tmp_path / "good.txt").write_text("\ufeffcafé", "utf-8")
    texts, skipped = read(tmp_path)
    assert texts == ["café"]
    assert skipped == [
        {"file": "latin.txt", "why": "not UTF-8: byte 0xe9"},
        {"file": "utf16.txt", "why": "not UTF-8: byte 0xff"},
    ]


def test_bad_lines_of_json_are_skipped_with_their_numbers(tmp_path: Path) -> None:
    bad = [b"{", b'"text"', b"[1]", b'{"other": 1}', b'{"text": 5}', b'{"text": "\xff"}', b"[" * 100_000, b"9" * 5000]
    rows = [b'{"text": "first"}', *bad, b"", b'{"text": "last"}']
    (tmp_path / "t.jsonl").write_bytes(b"\n".join(rows))
    texts, skipped = read(tmp_path / "t.jsonl")
    assert texts == ["first", "last"]
    assert [entry["file"] for entry in skipped] == [f"t.jsonl, line {n}" for n in range(2, 10)]
    assert {entry["why"] for entry in skipped} == {"not JSON", "not UTF-8", "no text under the key 'text'"}


def test_compressed_json_lines_and_another_key_are_read(tmp_path: Path) -> None:
    with gzip.open(tmp_path / "t.jsonl.gz", "wt") as file:
        file.write(json.dumps({"body": "words"}))
    assert read(tmp_path, text_field="body") == (["words"], [])


def test_parquet_is_read_and_empty_cells_skipped(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["one", None, "three"], "n": [1, 2, 3]}), tmp_path / "t.parquet")
    assert read(tmp_path) == (["one", "three"], [{"file": "t.parquet, row 2", "why": "no text in the column 'text'"}])
    assert read(tmp_path, text_field="body")[1][0]["why"] == "no column 'body'; it has text, n"


@pytest.mark.parametrize("name", ["t.parquet", "t.jsonl.gz"])
def test_a_damaged_file_is_skipped_and_its_neighbors_are_read(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"damaged")
    (tmp_path / "a.txt").write_text("good")
    texts, skipped = read(tmp_path)
    assert texts == ["good"]
    assert skipped[0]["file"] == name
    assert str(tmp_path) not in skipped[0]["why"]


def test_a_truncated_archive_gives_what_comes_before_the_end(tmp_path: Path) -> None:
    rows = "".join(json.dumps({"text": f"row {i}"}) + "\n" for i in range(5000))
    (tmp_path / "t.jsonl.gz").write_bytes(gzip.compress(rows.encode())[:-4000])
    texts, skipped = read(tmp_path)
    assert texts[0] == "row 0"
    assert skipped[-1]["file"] == "t.jsonl.gz"


def test_nul_is_taken_out_and_lone_surrogates_replaced(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "a\\u0000b \\ud83d c \\ud83d\\ude00"}')
    (tmp_path / "t.txt").write_text("a\0b")
    assert read(tmp_path) == (["ab \ufffd c \U0001f600", "ab"], [])


def test_an_endless_line_is_cut_without_being_held(tmp_path: Path) -> None:
    with (tmp_path / "t.txt").open("wb") as file:
        for _ in range(50):
            file.write(b"x" * 1_000_000)
    tracemalloc.start()
    texts, _ = read(tmp_path, characters=1000)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert texts == ["x" * 1000]
    assert peak < 2_000_000


def test_a_line_of_json_beyond_the_limit_is_skipped_and_the_next_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(documents, "MAX_LINE", 64)
    exactly = json.dumps({"text": "y" * 51})
    assert len(exactly) + 1 == 64
    rows = [json.dumps({"text": "x" * 1000}), exactly, json.dumps({"text": "short"}), json.dumps({"text": "z" * 90})]
    (tmp_path / "t.jsonl").write_text("\n".join(rows))
    texts, skipped = read(tmp_path)
    assert texts == ["y" * 51, "short"]
    assert [entry["file"] for entry in skipped] == ["t.jsonl, line 1", "t.jsonl, line 4"]


def test_only_the_first_thousand_skipped_are_listed(tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text("{\n" * 1500)
    skipped = Skipped()
    assert not list(read_documents(Source(source=str(tmp_path)), 100, skipped))
    assert (skipped.count, len(skipped.listed)) == (1500, 1000)


def test_a_file_knows_what_the_study_says_of_it(tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("words")
    source = Source(source=str(tmp_path / "t.txt"), language="en", kind="note", license="CC0")
    assert list(read_documents(source, 3, Skipped())) == [Document("wor", "", "t.txt", "en", "note", "CC0")]


def test_a_catalog_entry_brings_title_language_kind_and_license(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "archives" / "story-1.0.whl"
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.json", '{"k": {"title": "Dune", "extract": "Sand."}}')
    pinned = Archive("story", "1.0", path.stat().st_size, file_sha256(path))
    monkeypatch.setenv("MIND_ATLAS_CACHE", str(tmp_path))
    monkeypatch.setitem(TEXTS, "story", TextEntry(pinned, "*.json", "summaries", "en", "fiction", "MIT"))
    found = list(read_documents(Source(source="story", kind="tale"), 100, Skipped()))
    assert found == [Document("Dune\nSand.", "Dune", "story", "en", "tale", "MIT")]


def test_planted_text_is_made_and_never_a_text_that_a_prompt_may_be() -> None:
    source = Source(source="made:dna", license="CC0")
    found = list(read_documents(source, 100_000, Skipped()))
    assert len({document.text for document in found}) == 1000
    assert all(set(document.text) == set("ACGT\n") for document in found)
    assert found[0]._replace(text="") == Document("", "", "made:dna", "", "", "CC0")
    assert found == list(read_documents(source, 100_000, Skipped()))
    prompts = {text for _, text in islice(dna(np.random.default_rng(0)), 10_000)}
    assert not prompts & {line for document in found for line in document.text.split("\n")}
    with pytest.raises(MindAtlasError, match="made:dna"):
        read_documents(Source(source="made:rna"), 100, Skipped())


def test_an_unknown_source_is_refused_before_anything_is_read() -> None:
    with pytest.raises(MindAtlasError, match="wiki-en"):
        read_documents(Source(source="wiki_en"), 100, Skipped())


def test_a_data_set_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}

    def load_dataset(path: str, name: str | None, **options: Any) -> list[dict[str, str]]:
        asked.update(options, path=path, name=name)
        return [{"text": "one"}, {"text": "two"}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert read("hf:org/text", config="en", revision="abc") == (["one", "two"], [])
    assert asked == {"path": "org/text", "name": "en", "split": "train", "revision": "abc", "streaming": True}
    with pytest.raises(CorpusError, match="set text_field to one of text"):
        read("hf:org/text", text_field="body")


def test_a_data_set_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*arguments: Any, **options: Any) -> None:
        raise FileNotFoundError("Dataset 'org/text' doesn't exist\nmore")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(CorpusError, match=r"hf:org/text could not be read: Dataset 'org/text' doesn't exist$"):
        read("hf:org/text")


def test_without_the_library_a_data_set_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CorpusError, match="pip install"):
        read("hf:org/text")
