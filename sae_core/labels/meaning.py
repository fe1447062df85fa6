"""Features by what a query means: the nearest names, by the token vectors of the language model under study.

A name is the written label; where none was written, the tokens that the feature fires on. A name and a query alike
are sums of the vectors that the model has for their tokens: seen from the middle of the vocabulary and without the few
directions that all share (Mu and Viswanath 2018, all-but-the-top), of length 1, and counted by their rarity among all
names (idf). Sums are seen from the middle of all names, and compared by cosine. No model runs: a query costs a few
additions, and what it needs lies beside the labels.

Of 47 paraphrases of labels of `standard` ("waterways" for `river names`), 55% have a right feature among the first 30
of 16,384, by words and meaning together, with a median rank of 20; by words alone 23% have, and most find none. Among
the first ten it is 32% against 19%, and 45% by meaning alone. These same paraphrases chose how many directions are left
out (none: a median of 140 by meaning, three: 13) and `LEAST`, so expect somewhat less. The middle layer of the model,
as the scores of labels use it, tells written labels apart better (mean reciprocal rank 0.73, against 0.58 here, over
106), but a few of them ("numbers", "space") are near to everything among names made of tokens, and a query takes 50 ms.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import faiss
import numpy as np
from jaxtyping import Float32, Int64
from safetensors.numpy import load_file, save_file
from scipy.sparse import csr_matrix
from tokenizers import Tokenizer

from sae_core.artifacts import write_atomically
from sae_core.features import Features
from sae_core.labels.reader import LabelRow
from sae_core.study import ModelSettings

INDEX = "meaning.faiss"
VECTORS = "meaning.safetensors"
TOKENIZER = "tokenizer.json"

LEAST = 0.2
"""Cosine from which on a name is told; with a query, 1 in 1000 names of `standard` reaches 0.27."""
_SHARED = 3  # directions that are left out
_LOOKED_AT = 8192  # tokens of which they are the main ones

Rows = Float32[np.ndarray, "n d_model"]
Weighted = Sequence[tuple[str, float]]
"""A name: its texts, and how much each counts."""


class Meaning:
    """The names of all features, searched by meaning. Safe to use from several threads."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tokenizer = Tokenizer.from_file(str(folder / TOKENIZER))
        found = load_file(folder / VECTORS)
        self._tokens, self._middle = found["tokens"], found["middle"]

    @cached_property
    def _index(self) -> faiss.Index:
        return faiss.read_index(str(self._folder / INDEX), faiss.IO_FLAG_MMAP_IFC)

    @classmethod
    def open(cls, folder: Path) -> "Meaning | None":
        """The index among finished labels; None where there is none."""
        return cls(folder) if (folder / INDEX).is_file() else None

    def find(self, query: str, limit: int = 100) -> tuple[Float32[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
        """Cosines and numbers of the features whose names are nearest to a query, nearest first.

        Few or none where little is as near as `LEAST`, or the model has no vectors for the query's tokens.
        """
        told = self.vectors([query])
        if not told.any():
            return np.empty(0, np.float32), np.empty(0, np.int64)
        asked = unit(told - self._middle)
        cosines, found = self._index.search(asked, min(limit, self._index.ntotal))
        near = (cosines[0] >= LEAST) & (found[0] >= 0)  # a graph may find fewer than asked
        return cosines[0][near], found[0][near]

    def vectors(self, texts: Sequence[str]) -> Rows:
        """What texts mean: sums of their tokens' vectors, of length 1; 0 where the model has none of their tokens."""
        clean = [text.encode("utf-8", "replace").decode() for text in texts]
        counts = _counts(self._tokenizer, [[(text, 1.0)] for text in clean], len(self._tokens))
        used, places = np.unique(counts.indices, return_inverse=True)
        few = csr_matrix((counts.data, places, counts.indptr), (len(texts), len(used)))
        return unit(np.asarray(few @ self._tokens[used].astype(np.float32)))


def write_meaning(model: ModelSettings, features: Features, rows: Sequence[LabelRow], folder: Path) -> None:
    """Write the index of the features' names into `folder`; nothing where the tokenizer cannot be kept in one file."""
    from sae_core.language_model import LanguageModel  # torch, which reading does without

    lm = LanguageModel.load(model)
    tokenizer = getattr(lm.tokenizer, "backend_tokenizer", None)
    if tokenizer is not None:
        vectors = lm.model.get_input_embeddings().weight.detach().float().cpu().numpy()
        write_index(vectors, tokenizer, [*names(features, rows)], folder)


def names(features: Features, rows: Sequence[LabelRow]) -> list[Weighted]:
    """What is said of each feature: its label, else the tokens that it fires on by their shares."""
    told = features.columns("top_tokens", "top_token_shares").to_pydict()
    fires = zip(told["top_tokens"], told["top_token_shares"], strict=True)
    return [
        [(row.label, 1.0)] if row.label else _merged(tokens, shares)
        for row, (tokens, shares) in zip(rows, fires, strict=True)
    ]


def write_index(vectors: Rows, tokenizer: Tokenizer, named: Sequence[Weighted], folder: Path) -> None:
    """Write the index of names, given the model's token vectors."""
    from sae_core.neighbors import build_index  # torch, which reading does without
    from sae_core.study import NeighborSettings

    counts = _counts(tokenizer, named, len(vectors))
    in_names = np.bincount(counts.indices, minlength=len(vectors))
    idf = np.log1p(len(named) / (1 + in_names)).astype(np.float32)
    tokens = unit(_told_apart(vectors)) * idf[:, None]
    rows = unit(np.ascontiguousarray(counts @ tokens, np.float32))
    has_name = rows.any(1)
    middle = rows[has_name].mean(0) if has_name.any() else np.zeros(vectors.shape[1], np.float32)
    rows[has_name] = unit(rows[has_name] - middle)
    with write_atomically(folder / INDEX) as path:
        faiss.write_index(build_index(rows, NeighborSettings()), str(path))
    with write_atomically(folder / VECTORS) as path:
        save_file({"tokens": tokens.astype(np.float16), "middle": middle}, path)
    with write_atomically(folder / TOKENIZER) as path:
        path.write_text(tokenizer.to_str(), "utf-8")


def _told_apart(vectors: Rows) -> Rows:
    """Token vectors without their mean, and without the main directions of what is left."""
    rows = vectors - vectors.mean(0)
    some = rows[:: max(1, len(rows) // _LOOKED_AT)]
    shared = np.linalg.eigh(some.T @ some)[1][:, -_SHARED:]
    return rows - rows @ shared @ shared.T


def _counts(tokenizer: Tokenizer, named: Sequence[Weighted], n_vocab: int) -> csr_matrix:
    """How much each token counts in each name, before its rarity."""
    texts = [(i, text, weight) for i, name in enumerate(named) for text, weight in name]
    ids = _ids(tokenizer, [text for _, text, _ in texts])
    lengths = np.array([len(x) for x in ids], np.int64)
    rows = np.repeat(np.array([i for i, *_ in texts], np.int64), lengths)
    share = np.array([weight for *_, weight in texts], np.float32) / np.maximum(lengths, 1)
    columns = np.concatenate([np.empty(0, np.int64), *ids])
    return csr_matrix((np.repeat(share, lengths).astype(np.float32), (rows, columns)), (len(named), n_vocab))


def _ids(tokenizer: Tokenizer, texts: Sequence[str]) -> list[np.ndarray]:
    """Tokens of each text, as they are in the middle of one; none of a blank text."""
    found = tokenizer.encode_batch([f" {text.strip()}" for text in texts], add_special_tokens=False)
    return [np.array(tokens.ids if text.strip() else [], np.int64) for text, tokens in zip(texts, found, strict=True)]


def _merged(tokens: Sequence[str], shares: Sequence[float]) -> Weighted:
    """Tokens with their shares: variants in case and spaces as one, without those of bytes that are no text."""
    found: dict[str, float] = {}
    for token, share in zip(tokens, shares, strict=True):
        text = token.strip().lower()
        if text and "\\x" not in text:
            found[text] = found.get(text, 0.0) + share
    return [*found.items()]


def unit(rows: Rows) -> Rows:
    """The rows with length 1; those of length 0 as they are."""
    norms = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.ascontiguousarray(rows / np.where(norms > 0, norms, 1), np.float32)
