"""The words of an atlas: which texts hold a word, so that a search reads what it finds and nothing else.

An index is a folder of files that are mapped into memory, made from the finished features and labels and kept beside
them in `<root>/search/`, under a name that follows from both: where one was made anew, so is the index. It can be
thrown away at any time.

    texts.arrow      every text that is searched, a row each, field by field and feature by feature
    features.i32     the feature of each row
    terms.arrow      every word, sorted, and where its rows begin
    rows.u32         the rows of each word, ascending

A word is a stretch of letters and digits; other characters, and those of scripts that put no spaces between words, are
words by themselves. A query is looked up by its words, and compared with the texts themselves where that is not enough:
where it holds more than one word, or begins anywhere but at the start of one.
"""

import json
import re
import shutil
import unicodedata
from bisect import bisect_left
from functools import lru_cache, reduce
from pathlib import Path
from typing import Any, NamedTuple

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.ipc
from filelock import FileLock
from jaxtyping import Int32, Int64, UInt32

from sae_core.artifacts import ArtifactError, ArtifactStore
from sae_core.settings import fingerprint

VERSION = 1
FIELDS = {
    "label": (8.0, "labels", "SELECT feature, label FROM labels"),
    "description": (4.0, "labels", "SELECT feature, description FROM labels"),
    "lexical label": (3.0, "labels", "SELECT feature, lexical FROM labels"),
    "promoted token": (2.0, "features", "SELECT feature, unnest(promoted) FROM features"),
    "top token": (2.0, "features", "SELECT feature, unnest(top_tokens) FROM features"),
    "example": (1.0, "examples", "SELECT feature, array_to_string(tokens, '') FROM examples"),
}
"""What is searched: how much a word there counts, and where it is. What was said of the feature comes first."""

MAX_COMPARED = 20_000
"""Texts that are compared with one term of a query. A phrase whose words are together in more of them is not looked
for, as it tells little; of other terms, the first so many texts count, labels before examples."""
MAX_BEGINNINGS = 2_000_000
"""Where more texts hold a word that begins as asked, only those count that hold the very word."""

_TABLES = {"features": ("features", "features.parquet"), "examples": ("features", "examples.parquet"),
           "labels": ("labels", "labels.parquet")}  # fmt: skip
_UNSPACED = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "THAI", "LAO", "KHMER", "MYANMAR", "TIBETAN")
_SCRIPTS = "".join(rf"\p{{{s.title()}}}" for s in ("HAN", *_UNSPACED[1:])) + "\u30fc"
_WORDS = r"[\p{L}\p{N}]+|[^\p{L}\p{N}\s]"
_BATCH = 2**16  # texts read at once
_MEMORY = "1GB"  # of the sort; what does not fit is spilled


class Found(NamedTuple):
    """The texts of one field that hold a term, counted."""

    field: str
    features: Int32[np.ndarray, " n"]
    """Ascending, each once."""
    begins: Int64[np.ndarray, " n+1"]
    """Where the texts of each begin in `rows`, and where the last one's end."""
    rows: UInt32[np.ndarray, " rows"]
    """The texts, by feature."""

    @property
    def counts(self) -> Int64[np.ndarray, " n"]:
        """Texts of each feature that hold the term."""
        return np.diff(self.begins)


class WordIndex:
    """The index of one dictionary. Safe to use from several threads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        said = json.loads((folder / "index.json").read_text("utf-8"))
        self._fields, self._starts = list(said["fields"]), np.array([0, *np.cumsum(list(said["fields"].values()))])
        self._features = _mapped(folder / "features.i32", np.int32)
        self._rows = _mapped(folder / "rows.u32", np.uint32)
        self._texts = pa.ipc.open_file(pa.memory_map(str(folder / "texts.arrow")))
        terms = pa.ipc.open_file(pa.memory_map(str(folder / "terms.arrow"))).read_all().combine_chunks()
        self._terms, self._begins = terms["term"].chunk(0), terms["begins"].chunk(0).to_numpy()
        self._batch = lru_cache(1024)(self._texts.get_batch)  # mapped, not copied
        sizes = [self._batch(i).num_rows for i in range(self._texts.num_record_batches)]
        self._batch_starts = np.array([0, *np.cumsum(sizes)])

    @classmethod
    def open(cls, store: ArtifactStore, dictionary: str) -> "WordIndex":
        """The index of what is made now of a dictionary; made first where it is not there, in one process at a time.

        Raises ArtifactError when there are no features, or the index cannot be written.
        """
        made = [store.get("features", dictionary)]
        made += [store.get("labels", dictionary)] if store.manifest("labels", dictionary) else []
        key = fingerprint([VERSION, *([m.manifest.fingerprint, m.folder.name, m.manifest.made_at] for m in made)])
        home = store.root / "search" / dictionary
        if not (home / key).is_dir():
            try:
                home.mkdir(parents=True, exist_ok=True)
                with FileLock(home / ".lock"):
                    if not (home / key).is_dir():
                        _make({m.manifest.stage: m.folder for m in made}, home, key)
            except OSError as error:
                raise ArtifactError(f"cannot write the words of the atlas to {home}: {error.strerror}") from None
        return cls(home / key)

    def text(self, row: int) -> str:
        """A text."""
        batch = int(np.searchsorted(self._batch_starts, row, "right")) - 1
        return str(self._batch(batch)["text"][row - int(self._batch_starts[batch])].as_py())

    def find(self, term: str) -> list[Found]:
        """The texts that hold a term of `terms`, field by field; fields without any are left out."""
        pieces, rows = _pieces(term), reduce(_common, self._each(term))
        if len(pieces) > 1 or pieces[0].word != term:
            rows = rows[self._match(rows[:MAX_COMPARED], _pattern(term))]
        return self._counted(rows)

    def is_common(self, term: str) -> bool:
        """Whether a term is a phrase that too many texts may hold to look for it."""
        return " " in term and len(reduce(_common, self._each(term))) > MAX_COMPARED

    def _each(self, term: str) -> list[np.ndarray]:
        """The rows of each word of a term, the fewest first."""
        found = (self._begin_with(p.word) if p.is_start else self._equal(p.word) for p in _pieces(term))
        return sorted(found, key=len)

    def _match(self, rows: np.ndarray, pattern: str) -> np.ndarray:
        """Places of the rows whose texts match."""
        found, cuts = [np.empty(0, np.int64)], np.searchsorted(rows, self._batch_starts)
        for batch in np.flatnonzero(np.diff(cuts)).tolist():
            some = slice(cuts[batch], cuts[batch + 1])
            texts = self._batch(batch)["text"].take(pa.array(rows[some] - self._batch_starts[batch]))
            found.append(np.flatnonzero(pc.match_substring_regex(texts, pattern)) + some.start)
        return np.concatenate(found)

    def _counted(self, rows: np.ndarray) -> list[Found]:
        found, cuts = [], np.searchsorted(rows, self._starts)
        for field, start, stop in zip(self._fields, cuts, cuts[1:], strict=False):
            of = self._features[rows[start:stop]]
            first = np.flatnonzero(np.diff(of, prepend=-1))
            if len(of):
                found.append(Found(field, of[first], np.append(first, len(of)), rows[start:stop]))
        return found

    def first_text(self, found: Found, place: int) -> str:
        """The first, by the alphabet, of the texts that were found of the feature at a place in `found.features`."""
        return min(self.text(int(row)) for row in found.rows[found.begins[place] : found.begins[place + 1]])

    def _begin_with(self, prefix: str) -> np.ndarray:
        """Rows that hold a word that begins so, ascending."""
        first, last = self._place(prefix), self._place(prefix + "\U0010ffff")
        rows = self._rows[self._begins[first] : self._begins[last]]
        if len(rows) > MAX_BEGINNINGS:
            return self._equal(prefix)
        if last - first < 2:
            return rows
        rows = np.sort(rows, kind="stable")  # which joins ascending runs; np.unique would take ten times as long
        return rows[np.diff(rows, prepend=rows[:1] + 1) != 0]

    def _equal(self, word: str) -> np.ndarray:
        at = self._place(word)
        is_there = at < len(self._terms) and self._terms[at].as_py() == word
        return self._rows[self._begins[at] : self._begins[at + 1]] if is_there else self._rows[:0]

    def _place(self, word: str) -> int:
        return bisect_left(_Strings(self._terms), word)


class _Strings:
    """An Arrow array of strings, as `bisect` asks for it. Strings sort as their UTF-8 does: by code points."""

    def __init__(self, strings: pa.Array) -> None:
        self._strings = strings

    def __len__(self) -> int:
        return len(self._strings) - 1  # the last only says where the rows end

    def __getitem__(self, i: int) -> Any:
        return self._strings[i].as_py()


class _Piece(NamedTuple):
    """A word that a text must hold."""

    word: str
    is_start: bool
    """A longer word that begins so will do."""


def terms(query: str, at_most: int = 16) -> list[str]:
    """The words of a query, and the whole of it when it has several; what no stored text can hold is dropped."""
    clean = query.replace("\0", " ").encode("utf-8", "ignore").decode()
    words = unicodedata.normalize("NFC", clean).casefold().split()[:at_most]
    return list(dict.fromkeys(words if len(words) < 2 else [*words, " ".join(words)]))


def _pieces(term: str) -> list[_Piece]:
    """The words that every text with the term holds."""
    found = []
    for word in re.finditer(r"[^\W_]+|[^\w\s]|_", term):
        if _is_unspaced(word[0][0]):
            found += [_Piece(character, False) for character in word[0] if _is_unspaced(character)]
        else:
            found.append(_Piece(word[0], word[0].isalnum() and word.end() == len(term)))
    return found


def _pattern(term: str) -> str:
    """RE2 pattern of a term: any case, at the start of a word where its script puts spaces between words."""
    starts_word = term[0].isalnum() and not _is_unspaced(term[0])
    return "(?i)" + (r"(?:^|[^\p{L}\p{N}])" if starts_word else "") + r"\s+".join(map(re.escape, term.split()))


def _is_unspaced(character: str) -> bool:
    return unicodedata.name(character, "").startswith(_UNSPACED)


def _common(few: np.ndarray, many: np.ndarray) -> np.ndarray:
    """Rows that are in both; both ascend."""
    if not len(many):
        return few[:0]
    return few[many[np.minimum(np.searchsorted(many, few), len(many) - 1)] == few]


def _mapped(path: Path, kind: type) -> np.ndarray:
    """A file of numbers, read as it is asked for."""
    return np.memmap(path, kind, "r") if path.stat().st_size else np.empty(0, kind)


def _make(folders: dict[str, Path], home: Path, key: str) -> None:
    """Write the index `home/key`, whole or not at all, and drop all others, which nobody will ask for again."""
    draft = home / f"{key}.draft"
    shutil.rmtree(draft, ignore_errors=True)  # left by a killed process
    draft.mkdir()
    settings: dict[str, str | bool | int | float | list[str]] = {
        "memory_limit": _MEMORY,
        "temp_directory": str(draft / "spill"),
        "autoinstall_known_extensions": "false",
    }
    with duckdb.connect(config=settings) as database:
        for table, (stage, file) in _TABLES.items():
            if stage in folders:
                path = str(folders[stage] / file).replace("'", "''")
                database.execute(f"CREATE VIEW {table} AS SELECT * FROM read_parquet('{path}')")
        fields = _write_texts(database, set(folders), draft)
        _write_terms(database, draft)
    shutil.rmtree(draft / "spill", ignore_errors=True)
    (draft / "index.json").write_text(json.dumps({"fields": fields}), "utf-8")
    draft.rename(home / key)
    for other in home.iterdir():
        if other.is_dir() and other.name != key:
            shutil.rmtree(other, ignore_errors=True)  # whoever reads it has its files open


def _write_texts(database: duckdb.DuckDBPyConnection, stages: set[str], folder: Path) -> dict[str, int]:
    """Write all texts and their features; returns the number of texts of each field."""
    schema, counts, row = pa.schema([("row", pa.uint32()), ("text", pa.string())]), {}, 0
    with pa.ipc.new_file(folder / "texts.arrow", schema) as texts, (folder / "features.i32").open("wb") as features:
        for field, (_, table, select) in FIELDS.items():
            if _TABLES[table][0] not in stages:
                continue
            first = row
            sql = f"SELECT feature::INT AS feature, text FROM ({select}) AS found(feature, text) WHERE text <> ''"
            for batch in database.sql(sql).to_arrow_reader(_BATCH):
                batch["feature"].to_numpy().astype(np.int32).tofile(features)
                rows = pa.array(np.arange(row, row + len(batch), dtype=np.uint32))
                texts.write_batch(pa.record_batch([rows, batch["text"].cast(pa.string())], schema))
                row += len(batch)
            counts[field] = row - first
    return counts


def _write_terms(database: duckdb.DuckDBPyConnection, folder: Path) -> None:
    """Write every word of the texts, and the rows that hold it."""
    database.register("texts", pa.ipc.open_file(pa.memory_map(str(folder / "texts.arrow"))).read_all())
    sql = f"""
        SELECT term, row FROM (
            SELECT row, unnest(list_distinct(list_concat(
                regexp_extract_all(folded, '{_WORDS}'), regexp_extract_all(folded, '[{_SCRIPTS}]')))) AS term
            FROM (SELECT row, replace(lower(text), 'ς', 'σ') AS folded FROM texts))
        ORDER BY term, row"""
    words: list[pa.Array] = []
    begins: list[np.ndarray] = []
    total = 0
    with (folder / "rows.u32").open("wb") as rows:
        for batch in database.sql(sql).to_arrow_reader(_BATCH):
            batch["row"].to_numpy().tofile(rows)
            runs = pc.run_end_encode(batch["term"])
            begins.append(np.array([0, *runs.run_ends.to_numpy()[:-1]], np.int64) + total)
            words.append(runs.values)
            total += len(batch)
    every = pa.concat_arrays([*words, pa.array([None], pa.string())]) if words else pa.array([None], pa.string())
    starts = np.array([*np.concatenate(begins or [np.empty(0, np.int64)]), total], np.int64)
    is_new = np.ones(len(every), bool)  # a word may go on from one batch into the next
    is_new[1:-1] = pc.not_equal(every[1:-1], every[:-2]).to_numpy(zero_copy_only=False)
    table = pa.table({"term": every.filter(pa.array(is_new)), "begins": starts[is_new]})
    with pa.ipc.new_file(folder / "terms.arrow", table.schema) as file:
        file.write_table(table.combine_chunks())
