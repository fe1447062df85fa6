"""Make a corpus: draw documents by weight, drop duplicates, tokenize, split, pack."""

import json
import random
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.numpy import save_file

from sae_core.artifacts import require_space, write_atomically
from sae_core.corpus.documents import CorpusError, Document, Skipped, read_documents
from sae_core.corpus.packing import Packer
from sae_core.corpus.reader import ROW_GROUP, SCHEMA
from sae_core.progress import Report, silent
from sae_core.study import CorpusSettings, ModelSettings, Source

CHARACTERS_PER_TOKEN = 16
"""Documents are cut to this many characters a token before they are tokenized, so that an endless line costs nothing.

English prose has about 4.5 (SmolLM2), other text fewer; only runs of blanks and rules have more than this.
"""
SHUFFLED_CHARACTERS = 8_000_000
"""A source is shuffled within a window of this many characters; smaller sources, wholly."""
_BATCH = 64
_BYTES_PER_TOKEN = 20
"""On disk: 12 in the blocks, the rest for the text, of which the compressed bytes are fewer."""


@dataclass
class Drawn:
    """What has been taken from one source; the corpus's table of sources."""

    source: str
    language: str = ""
    kind: str = ""
    license: str = ""
    documents: int = 0
    tokens: int = 0
    characters: int = 0


@dataclass
class _Stream:
    """A source that is being drawn from."""

    items: Iterator[tuple[Document, list[int]]]
    weight: float
    drawn: Drawn

    def add(self, document: Document, n_tokens: int) -> None:
        d = self.drawn
        d.source, d.language, d.kind, d.license = document.source, document.language, document.kind, document.license
        d.documents, d.tokens, d.characters = d.documents + 1, d.tokens + n_tokens, d.characters + len(document.text)


def build_corpus(
    settings: CorpusSettings, model: ModelSettings, folder: Path, report: Report = silent
) -> dict[str, Any]:
    """Write a corpus of at most `settings.tokens` tokens into `folder`; read it with `Corpus`.

    The next document comes from the source that is furthest behind its weight, counted in tokens; when a source runs
    dry the others go on in their proportions. Within a source the order is random. A document is a duplicate when
    another one, of whatever source, was drawn before it that differs only in white space and capitals. Whether a
    document is held out depends on its text and the seed alone. Text that spells a special token is split like any
    other. The tokens of the last document are cut to the budget.

    Memory: 24 bytes a token at most, about 100 bytes a document, and a window of each source.

    Args:
        settings: sources, budget, lengths.
        model: whose tokenizer splits the text.
        folder: where the files go; a killed run's are replaced.
        report: hears of tokens drawn, and of bytes while catalog archives are fetched.

    Returns:
        Counts over both splits (`documents`, `tokens`, `n_blocks`), the same of the held-out split (`*_held_out`);
        `duplicates`, `too_short`, `skipped` (not readable, see `skipped.json`), `short_by` (tokens missing from the
        budget), and `sources`, the table of what each gave.

    Raises:
        CorpusError: a source gives no document, or a split would be empty.
        MindAtlasError: a source or the model cannot be found or fetched; the disk is full.
    """
    from sae_core.pretrained import expected_bos, load_tokenizer  # torch, which reading a corpus does without

    require_space(folder, settings.tokens * _BYTES_PER_TOKEN)
    tokenizer = load_tokenizer(model, report)
    return _Builder(settings, tokenizer, expected_bos(tokenizer), folder, report).build()


class _Builder:
    def __init__(self, settings: CorpusSettings, tokenizer: Any, bos: int | None, folder: Path, report: Report) -> None:
        if not tokenizer.is_fast:
            raise CorpusError("the model has no fast tokenizer (tokenizer.json): choose a model that has one")
        self.settings, self.tokenizer, self.folder, self.report = settings, tokenizer, folder, report
        self.bos = bos
        self.packers = {split: Packer(settings.block_tokens, self.bos) for split in ("train", "held_out")}
        self.documents = dict.fromkeys(self.packers, 0)
        self.tokens = dict.fromkeys(self.packers, 0)
        self.seen: set[bytes] = set()
        self.skipped, self.too_short, self.duplicates = Skipped(), 0, 0

    def build(self) -> dict[str, Any]:
        streams = [self._stream(i, source) for i, source in enumerate(self.settings.sources)]
        with ExitStack() as stack:
            path = stack.enter_context(write_atomically(self.folder / "documents.parquet"))
            table = stack.enter_context(pq.ParquetWriter(path, SCHEMA, compression="zstd"))
            rows = self._draw(streams)
            while batch := list(islice(rows, ROW_GROUP)):
                table.write_table(pa.Table.from_pylist(batch, SCHEMA))
        self._refuse_empty_splits()
        return self._write_blocks() | self._counts(streams)

    def _stream(self, index: int, source: Source) -> _Stream:
        characters = self.settings.max_document_tokens * CHARACTERS_PER_TOKEN
        documents = self._long_enough(read_documents(source, characters, self.skipped, self.report))
        order = random.Random(f"{self.settings.seed} {index}")
        return _Stream(self._tokenized(shuffled(documents, order)), source.weight, Drawn(source.source))

    def _long_enough(self, documents: Iterable[Document]) -> Iterator[Document]:
        for document in documents:
            if len(document.text.strip()) >= self.settings.min_characters:
                yield document
            else:
                self.too_short += 1

    def _tokenized(self, documents: Iterator[Document]) -> Iterator[tuple[Document, list[int]]]:
        """Each document, cut to the longest that is allowed, with its tokens."""
        start = [] if self.bos is None else [self.bos]
        longest = self.settings.max_document_tokens - len(start)
        while batch := list(islice(documents, _BATCH)):
            encoded = self.tokenizer(
                [document.text for document in batch], add_special_tokens=False, split_special_tokens=True,
                truncation=True, max_length=longest, return_offsets_mapping=True, return_attention_mask=False,
            )  # fmt: skip
            for document, ids, spans in zip(batch, encoded["input_ids"], encoded["offset_mapping"], strict=True):
                text = document.text[: spans[-1][1]] if len(ids) == longest else document.text
                yield document._replace(text=text), start + ids

    def _draw(self, streams: list[_Stream]) -> Iterator[dict[str, Any]]:
        """Rows of the table of documents, whose tokens go to the packers on the way."""
        live = list(streams)
        while live and (left := self.settings.tokens - sum(self.tokens.values())) > 0:
            stream = min(live, key=lambda s: s.drawn.tokens / s.weight)
            document, token_ids = next(stream.items, (None, []))
            if document is None:
                self._refuse_nothing(stream.drawn)
                live.remove(stream)
            elif (digest := text_digest(document.text)) in self.seen:
                self.duplicates += 1
            else:
                self.seen.add(digest)
                stream.add(document, min(len(token_ids), left))
                yield self._add(document, token_ids[:left], digest)

    def _add(self, document: Document, token_ids: list[int], digest: bytes) -> dict[str, Any]:
        held_out = is_held_out(digest, self.settings.seed, self.settings.held_out)
        split = "held_out" if held_out else "train"
        number = sum(self.documents.values())
        self.packers[split].add(number, token_ids)
        self.documents[split] += 1
        self.tokens[split] += len(token_ids)
        self.report(sum(self.tokens.values()), self.settings.tokens, "tokens")
        return {"document": number, **document._asdict(), "split": split, "n_tokens": len(token_ids)}

    def _refuse_nothing(self, drawn: Drawn) -> None:
        """Raise CorpusError when a source has run dry without having given a document."""
        if drawn.documents == 0:
            first = "; ".join(f"{entry['file']}: {entry['why']}" for entry in self.skipped.listed[:1])
            raise CorpusError(
                f"corpus.sources: {drawn.source} has no document of at least {self.settings.min_characters} characters "
                f"that the others lack{f' (skipped {first})' if first else ''}: give another"
            )

    def _refuse_empty_splits(self) -> None:
        share = self.settings.held_out
        empty = [split for split, count in self.documents.items() if count == 0]
        if empty:
            raise CorpusError(
                f"corpus.held_out = {share}: of {sum(self.documents.values())} documents none fell to the {empty[0]} "
                "split: give more text, or another share or seed"
            )

    def _write_blocks(self) -> dict[str, int]:
        n_blocks = {}
        for split, packer in self.packers.items():
            blocks = packer.blocks()
            n_blocks[split] = len(blocks.token_ids)
            with write_atomically(self.folder / f"{split}.safetensors") as path:
                save_file(blocks._asdict(), path)
        with write_atomically(self.folder / "skipped.json") as path:
            path.write_text(json.dumps(self.skipped.listed, indent=1), "utf-8")
        return {"n_blocks": sum(n_blocks.values()), "n_blocks_held_out": n_blocks["held_out"]}

    def _counts(self, streams: list[_Stream]) -> dict[str, Any]:
        tokens = sum(self.tokens.values())
        return {
            "documents": sum(self.documents.values()),
            "documents_held_out": self.documents["held_out"],
            "tokens": tokens,
            "tokens_held_out": self.tokens["held_out"],
            "duplicates": self.duplicates,
            "too_short": self.too_short,
            "skipped": self.skipped.count,
            "short_by": self.settings.tokens - tokens,
            "sources": [vars(stream.drawn) for stream in streams],
        }


def shuffled(
    documents: Iterable[Document], order: random.Random, window: int = SHUFFLED_CHARACTERS
) -> Iterator[Document]:
    """The documents in random order, of which at most `window` characters, and one document, wait at any time."""
    waiting: list[Document] = []
    characters = 0
    for document in documents:
        waiting.append(document)
        characters += len(document.text)
        while characters > window:
            yield (chosen := _take(waiting, order))
            characters -= len(chosen.text)
    while waiting:
        yield _take(waiting, order)


def _take(waiting: list[Document], order: random.Random) -> Document:
    """Remove a random one: the last fills its place."""
    place = order.randrange(len(waiting))
    waiting[place], waiting[-1] = waiting[-1], waiting[place]
    return waiting.pop()


def text_digest(text: str) -> bytes:
    """128 bits that are equal for texts that differ only in white space and capitals."""
    return blake2b(" ".join(text.casefold().split()).encode(), digest_size=16).digest()


def is_held_out(digest: bytes, seed: int, share: float) -> bool:
    """Whether a document belongs to the held-out `share`, decided by its digest and the seed and nothing else."""
    draw = blake2b(digest, key=str(seed).encode(), digest_size=8).digest()
    return int.from_bytes(draw, "big") < share * 2**64
