"""How alike a label and a text are, by a sentence-embedding model: nobody is asked.

The catalog's all-MiniLM-L6-v2 (Reimers and Gurevych 2019; 22 million weights) has read a billion pairs of sentences,
most of them English. What it tells apart, and what the middle layer of the studied model told apart in its place, is in
docs/labels.md. It is weak where a name is one of form (digits, an opening parenthesis, the word "well").
"""

import re
from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from sae_core.pretrained import load_embedder
from sae_core.progress import Report, silent

_BYTES = re.compile(r"(?:\\x[0-9a-f]{2})+")

Rows = Float[np.ndarray, "texts width"]


class Embedder:
    """Texts and names as unit vectors, whose inner product is their similarity.

    Args:
        source: as `labels.embedder`.
        report: progress in bytes, while it is fetched.

    Raises:
        ModelError: it cannot be loaded.
        CatalogError: it cannot be found or fetched.
    """

    def __init__(self, source: str, report: Report = silent) -> None:
        self._model = load_embedder(source, report)

    def texts(self, texts: Sequence[str]) -> Rows:
        """Vectors of texts; of a text that is longer than the model reads (256 tokens), of its beginning."""
        return self._model.encode_document(list(texts), normalize_embeddings=True, show_progress_bar=False)

    def names(self, names: Sequence[str]) -> Rows:
        """Vectors of names, as queries for texts, where the model tells the two apart."""
        return self._model.encode_query(list(names), normalize_embeddings=True, show_progress_bar=False)


def joined(tokens: Sequence[str]) -> str:
    """The text of tokens; characters that lie in several tokens, shown as `\\xd0` in each, are put together again."""
    return _BYTES.sub(lambda found: _decoded(found[0]), "".join(tokens))


def _decoded(escaped: str) -> str:
    return bytes.fromhex(escaped.replace("\\x", "")).decode("utf-8", errors="backslashreplace")
