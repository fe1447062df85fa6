from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_core.corpus.packing import PADDING, Blocks, Packer

DOCUMENTS = st.lists(st.lists(st.integers(1, 50_000), max_size=40), max_size=12)


def pack(documents: list[list[int]], block_tokens: int, bos: int | None = None) -> Blocks:
    packer = Packer(block_tokens, bos)
    for number, token_ids in enumerate(documents):
        packer.add(number, token_ids)
    return packer.blocks()


def unpack(blocks: Blocks) -> dict[int, dict[int, int]]:
    """Token by position by document, read one place at a time."""
    found: dict[int, dict[int, int]] = defaultdict(dict)
    for block in range(len(blocks.token_ids)):
        for place in range(blocks.token_ids.shape[1]):
            if (document := int(blocks.documents[block, place])) != PADDING:
                found[document][int(blocks.positions[block, place])] = int(blocks.token_ids[block, place])
    return found


@given(DOCUMENTS, st.integers(2, 16))
def test_every_token_comes_back_at_its_position(documents: list[list[int]], block_tokens: int) -> None:
    blocks = pack(documents, block_tokens)
    assert unpack(blocks) == {n: dict(enumerate(ids)) for n, ids in enumerate(documents) if ids}


@given(DOCUMENTS, st.integers(2, 16))
def test_blocks_are_filled_greedily_and_padded_only_at_the_very_end(
    documents: list[list[int]], block_tokens: int
) -> None:
    flat = [token for ids in documents for token in ids]
    blocks = pack(documents, block_tokens)
    assert blocks.token_ids.shape == (-(-len(flat) // block_tokens), block_tokens)
    assert blocks.token_ids.ravel()[: len(flat)].tolist() == flat
    assert (blocks.documents.ravel()[: len(flat)] != PADDING).all()
    assert (blocks.documents.ravel()[len(flat) :] == PADDING).all()
    assert {array.dtype for array in blocks} == {np.dtype(np.int32)}


@given(st.lists(st.lists(st.integers(2, 99), max_size=40), max_size=12), st.integers(2, 16))
def test_with_a_beginning_token_every_piece_of_a_document_begins_with_it(
    bodies: list[list[int]], block_tokens: int
) -> None:
    documents = [[1, *body] for body in bodies]
    blocks = pack(documents, block_tokens, bos=1)
    assert unpack(blocks) == {n: dict(enumerate(ids)) for n, ids in enumerate(documents)}
    for token_ids, numbers, positions in zip(*blocks, strict=True):
        starts = np.flatnonzero(np.diff(numbers, prepend=-2))
        for start in starts[numbers[starts] != PADDING]:
            assert token_ids[start] == 1
            assert positions[start] == 0


def test_no_documents_make_no_blocks() -> None:
    assert pack([], 8).token_ids.shape == (0, 8)


@pytest.mark.parametrize("bos", [None, 1])
def test_packing_goes_on_after_blocks_were_read(bos: int | None) -> None:
    packer = Packer(8, bos)
    packer.add(0, [1, 2, 3])
    packer.blocks()
    packer.add(1, [1, 4])
    assert unpack(packer.blocks()) == {0: {0: 1, 1: 2, 2: 3}, 1: {0: 1, 1: 4}}
