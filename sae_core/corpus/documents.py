"""Documents from wherever a study says: the catalog, files, or a `datasets` data set; streamed, one at a time."""

import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from sae_core.catalog import fetch_text, find_text, list_files
from sae_core.catalog_entries import TEXTS
from sae_core.corpus.parsers import PARSERS, read_members
from sae_core.errors import MindAtlasError
from sae_core.made_texts import PLANTED, planted
from sae_core.progress import Report, silent
from sae_core.study import Source

MAX_LINE = 1 << 26
"""Bytes of the longest line of a JSONL file that is read (64 MiB)."""
_LISTED = 1000
_SURROGATES = re.compile("[\ud800-\udfff]")


class CorpusError(MindAtlasError):
    """Text from which no corpus can be made."""


class Document(NamedTuple):
    """One text and what is known of it."""

    text: str
    title: str
    """Also the text's first line, when there is one."""
    source: str
    language: str
    kind: str
    license: str


@dataclass
class Skipped:
    """What could not be read: all of it counted, the first thousand listed."""

    count: int = 0
    listed: list[dict[str, str]] = field(default_factory=list)

    def add(self, file: str, why: str) -> None:
        """Note that `file` (with a line number, of JSONL) was passed over."""
        self.count += 1
        if len(self.listed) < _LISTED:
            self.listed.append({"file": file, "why": why})


def read_documents(source: Source, characters: int, skipped: Skipped, report: Report = silent) -> Iterator[Document]:
    """The documents of a source, each cut to its first `characters`. What is no UTF-8 or no JSON goes to `skipped`.

    NUL is taken out, and halves of surrogate pairs, which no UTF-8 can hold, become U+FFFD.

    Raises:
        MindAtlasError: the source is unknown, holds nothing, or cannot be fetched or reached. A catalog archive is
            fetched, and a path looked at, before the first document is asked for.
    """
    found = find_text(source)
    if isinstance(found, Path):
        name, texts = found.name, _read_path(found, source.text_field, characters, skipped)
    elif found in TEXTS:
        name, texts = found, _read_catalog(found, report)
    elif found.startswith(PLANTED):
        name, texts = found, (("", text) for text in planted(found))
    else:
        name, texts = found, _read_hub(source)
    entry = TEXTS.get(found) if isinstance(found, str) else None
    about = {
        key: getattr(source, key) or (getattr(entry, key) if entry else "") for key in ("language", "kind", "license")
    }
    return (_document(title, text, characters, name, about) for title, text in texts)


def _document(title: str, text: str, characters: int, source: str, about: dict[str, str]) -> Document:
    title, text = _clean(title[:characters]), _clean(text[:characters])
    return Document(f"{title}\n{text}"[:characters] if title else text, title, source, **about)


def _clean(text: str) -> str:
    return _SURROGATES.sub("\ufffd", text.replace("\0", ""))


def _read_catalog(name: str, report: Report) -> Iterator[tuple[str, str]]:
    entry = TEXTS[name]
    return PARSERS[entry.parser](read_members(fetch_text(entry, report), entry.members), **entry.options)


def _read_path(path: Path, text_field: str, characters: int, skipped: Skipped) -> Iterator[tuple[str, str]]:
    for file in list_files(path):
        name = file.relative_to(path).as_posix() if path.is_dir() else file.name
        try:
            if file.suffix == ".parquet":
                texts = _read_parquet(file, name, text_field, skipped)
            elif file.name.endswith((".jsonl", ".jsonl.gz")):
                texts = _read_jsonl(file, name, text_field, skipped)
            else:
                texts = iter([_read_text(file, characters)])
            yield from (("", text) for text in texts)
        except UnicodeDecodeError as error:
            skipped.add(name, f"not UTF-8: byte {error.object[error.start]:#04x}")
        except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
            skipped.add(name, f"cannot be read: {error}".replace(str(path), path.name))


def _read_text(file: Path, characters: int) -> str:
    """The file's first characters; what follows them is not read, nor is it checked."""
    with file.open(encoding="utf-8-sig") as text:
        return text.read(characters)


def _read_jsonl(file: Path, name: str, text_field: str, skipped: Skipped) -> Iterator[str]:
    with gzip.open(file) if file.suffix == ".gz" else file.open("rb") as lines:
        for number, line in enumerate(_lines(lines), 1):
            where = f"{name}, line {number}"
            if line is None:
                skipped.add(where, f"longer than {MAX_LINE >> 20} MiB")
            elif line.strip():
                try:
                    yield json.loads(line)[text_field] + ""
                except UnicodeDecodeError:
                    skipped.add(where, "not UTF-8")
                except (ValueError, RecursionError):
                    skipped.add(where, "not JSON")
                except (LookupError, TypeError):
                    skipped.add(where, f"no text under the key {text_field!r}")


def _lines(file: gzip.GzipFile | io.BufferedReader) -> Iterator[bytes | None]:
    """The file's lines, None in place of each that is longer than `MAX_LINE`."""
    while line := file.readline(MAX_LINE):
        if len(line) < MAX_LINE or line.endswith(b"\n"):
            yield line
            continue
        while line and not line.endswith(b"\n"):
            line = file.readline(MAX_LINE)
        yield None


def _read_parquet(file: Path, name: str, text_field: str, skipped: Skipped) -> Iterator[str]:
    with pq.ParquetFile(file) as table:
        if text_field not in table.schema_arrow.names:
            skipped.add(name, f"no column {text_field!r}; it has {', '.join(table.schema_arrow.names)}")
            return
        number = 0
        for batch in table.iter_batches(64, columns=[text_field]):
            for text in batch.column(0).to_pylist():
                number += 1
                if isinstance(text, str):
                    yield text
                else:
                    skipped.add(f"{name}, row {number}", f"no text in the column {text_field!r}")


def _read_hub(source: Source) -> Iterator[tuple[str, str]]:
    """Rows of a `datasets` data set, streamed. Since version 4 that library runs no code of a data set."""
    try:
        import datasets  # an extra; and slow to import
    except ImportError:
        raise CorpusError(f"{source.source} needs the extra `datasets`: pip install -e '.[datasets]'") from None
    try:
        rows = datasets.load_dataset(
            source.source.removeprefix("hf:"),
            source.config,
            split=source.split,
            revision=source.revision,
            streaming=True,
        )
        for row in rows:
            yield "", _field(row, source)
    except (OSError, ValueError, RuntimeError) as error:
        why = str(error).strip().splitlines() or [type(error).__name__]
        raise CorpusError(f"corpus.sources: {source.source} could not be read: {why[0][:300]}") from error


def _field(row: dict[str, Any], source: Source) -> str:
    text = row.get(source.text_field)
    if not isinstance(text, str):
        raise CorpusError(
            f"corpus.sources: {source.source} has no text in {source.text_field!r}: set text_field to one of "
            + ", ".join(row)
        )
    return text
