"""Read a finished corpus."""

from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import load_file

from sae_core.corpus.packing import Blocks

ROW_GROUP = 512
"""Documents in a row group of `documents.parquet`, so that one of them is found without reading the rest."""
SCHEMA = pa.schema(
    [
        ("document", pa.int32()),
        ("source", pa.string()),
        ("title", pa.string()),
        ("language", pa.string()),
        ("kind", pa.string()),
        ("license", pa.string()),
        ("split", pa.string()),
        ("n_tokens", pa.int32()),
        ("text", pa.string()),
    ]
)


class Corpus:
    """Blocks of tokens, and the documents they come from."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._texts = lru_cache(maxsize=16)(self._read_texts)

    @classmethod
    def open(cls, folder: Path) -> "Corpus":
        """The corpus that `build_corpus` wrote into `folder`; files are read when they are asked for."""
        return cls(folder)

    @cached_property
    def train(self) -> Blocks:
        """The blocks that dictionaries are trained on."""
        return Blocks(**load_file(self.folder / "train.safetensors"))

    @cached_property
    def held_out(self) -> Blocks:
        """The blocks of documents kept from training."""
        return Blocks(**load_file(self.folder / "held_out.safetensors"))

    def documents(self) -> pa.Table:
        """All documents: number, source, title, language, kind, license, split, n_tokens, text."""
        return pq.read_table(self.folder / "documents.parquet")

    def text(self, document: int) -> str:
        """The text of one document. Raises IndexError when there is none of that number."""
        return self._texts(_group(document))[document % ROW_GROUP]

    def document(self, document: int) -> dict[str, Any]:
        """One document with everything that is kept of it (see `SCHEMA`); raises as `text`."""
        group = self._read(_group(document))
        if document % ROW_GROUP >= group.num_rows:
            raise IndexError(f"the corpus has {_group(document) * ROW_GROUP + group.num_rows} documents")
        return group.slice(document % ROW_GROUP, 1).to_pylist()[0]

    def _read_texts(self, group: int) -> list[str]:
        return self._read(group, ["text"]).column(0).to_pylist()

    def _read(self, group: int, columns: list[str] | None = None) -> pa.Table:
        with pq.ParquetFile(self.folder / "documents.parquet") as file:
            if group >= file.num_row_groups:
                raise IndexError(f"the corpus has {file.metadata.num_rows} documents")
            return file.read_row_group(group, columns=columns)


def _group(document: int) -> int:
    if document < 0:
        raise IndexError(f"documents are counted from 0, not {document}")
    return document // ROW_GROUP
