"""Documents' tokens, put one after another into blocks of equal length."""

from array import array
from collections.abc import Sequence
from typing import NamedTuple, TypeVar

import numpy as np
from jaxtyping import Int32

from sae_core.study import Packing

PADDING = -1
"""Document number of the places that no token fills."""

Documents = TypeVar("Documents")


class Blocks(NamedTuple):
    """Tokens in blocks, each with its document and its place there. Only the end of the last block can be empty."""

    token_ids: Int32[np.ndarray, "n_blocks block_tokens"]
    documents: Int32[np.ndarray, "n_blocks block_tokens"]
    """Row number in the table of documents; `PADDING` where there is no token."""
    positions: Int32[np.ndarray, "n_blocks block_tokens"]
    """Index of the token in its document."""


def kept_apart(documents: Documents, packing: Packing) -> Documents | None:
    """What attention keeps apart in blocks whose tokens are of the given documents; None when it runs over all."""
    return documents if packing == "documents" else None


class Packer:
    """Fills blocks greedily; a document that does not fit into the rest of a block goes on in the next.

    Holds 12 bytes a token in memory, and as much again while `blocks` puts them together.
    """

    def __init__(self, block_tokens: int, bos: int | None = None) -> None:
        """`bos`: token with which the model expects every sequence to begin.

        Documents bring it as their token 0. It is repeated, as position 0, where a document goes on in a new block.
        """
        self.block_tokens, self.bos = block_tokens, bos
        self._token_ids, self._documents, self._positions = array("i"), array("i"), array("i")

    def add(self, document: int, token_ids: Sequence[int]) -> None:
        """Append a document."""
        start = 0
        while start < len(token_ids):
            if start > 0 and self.bos is not None:
                self._extend(document, [self.bos], 0)
            room = self.block_tokens - len(self._token_ids) % self.block_tokens
            self._extend(document, token_ids[start : start + room], start)
            start += room

    def _extend(self, document: int, token_ids: Sequence[int], start: int) -> None:
        self._token_ids.extend(token_ids)
        self._documents.extend([document] * len(token_ids))
        self._positions.extend(range(start, start + len(token_ids)))

    def blocks(self) -> Blocks:
        """All blocks so far, the last one padded."""
        fills = ((self._token_ids, 0), (self._documents, PADDING), (self._positions, 0))
        return Blocks(*(self._padded(values, fill) for values, fill in fills))

    def _padded(self, values: array, fill: int) -> Int32[np.ndarray, "n_blocks block_tokens"]:
        n_blocks = -(-len(values) // self.block_tokens)
        flat = np.full(n_blocks * self.block_tokens, fill, np.int32)
        flat[: len(values)] = values
        return flat.reshape(n_blocks, self.block_tokens)
