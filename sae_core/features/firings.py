"""The dictionary run over every activation, kept sparse: which feature fires on which token, and how strongly.

One file for each activation shard, in which the firings of a feature lie side by side. A range of features is then
read over all shards without touching the others, so memory is bounded by the range and not by the corpus; and a
killed run goes on after the last whole file.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Int, Int32, Int64
from safetensors import safe_open
from safetensors.numpy import save_file

from sae_core.activations import Activations, Shard
from sae_core.artifacts import write_atomically
from sae_core.corpus import Blocks
from sae_core.dictionary import Dictionary
from sae_core.progress import Report

_BATCH = 4096  # activations encoded at once
_BEFORE = 3 / 4  # share of a window that comes before the token it is about


class Firings(NamedTuple):
    """The firings of a range of features on one shard, by feature and then in reading order."""

    feature: Int64[np.ndarray, " firings"]
    """Counted from the first feature of the range."""
    value: "np.ndarray[tuple[int], np.dtype[np.float32]]"
    block: Int32[np.ndarray, " firings"]
    offset: Int32[np.ndarray, " firings"]
    """The token's place in its block."""
    token: Int32[np.ndarray, " firings"]
    start: Int32[np.ndarray, " firings"]
    """First place, in the block, of the window that is shown around the token."""
    stop: Int32[np.ndarray, " firings"]
    """First place behind the window."""
    context: Int64[np.ndarray, " firings"]
    """The same number for all tokens of one document in one block: what the model saw at once."""
    window: Int64[np.ndarray, " firings"]
    """Hash of the window's tokens: equal text, equal number."""


class FiringStore:
    """The files of firings in a scratch folder."""

    def __init__(self, folder: Path, n_shards: int) -> None:
        self.paths = [folder / f"firings-{i:05d}.safetensors" for i in range(n_shards)]

    def fill(
        self, activations: Activations, corpus: Blocks, dictionary: Dictionary, context_tokens: int, report: Report
    ) -> None:
        """Write the files that are not there yet; progress in tokens."""
        done = 0
        for path, shard in zip(self.paths, activations.shards(), strict=True):
            if not path.exists():
                arrays = _encode(shard, corpus, dictionary, context_tokens)
                with write_atomically(path) as temporary:
                    save_file(arrays, temporary)
            done += len(shard.token)
            report(done, activations.n_tokens, "tokens")

    def read(self, features: range) -> Iterator[Firings]:
        """The firings of a range of features, shard by shard; shards without any are passed over."""
        for path in self.paths:
            with safe_open(path, "numpy") as file:
                starts = file.get_slice("starts")[features.start : features.stop + 1]
                firings = slice(int(starts[0]), int(starts[-1]))
                if firings.start == firings.stop:
                    continue
                row = file.get_slice("row")[firings]
                feature = np.repeat(np.arange(len(features)), np.diff(starts))
                places = {name: file.get_tensor(name)[row] for name in Firings._fields[2:]}
                yield Firings(feature, file.get_slice("value")[firings], **places)


def _encode(shard: Shard, corpus: Blocks, dictionary: Dictionary, context_tokens: int) -> dict[str, np.ndarray]:
    """The arrays of one file. Rows are brought into reading order, so that a context's firings are one run."""
    kept = np.flatnonzero(~np.asarray(shard.is_sink, dtype=bool))
    block, offset = np.asarray(shard.block)[kept], np.asarray(shard.offset)[kept]
    order = np.lexsort((offset, block))
    row, feature, value = _encode_rows(shard, kept[order], dictionary)
    by_feature = np.argsort(feature, kind="stable")
    counts = np.bincount(feature, minlength=dictionary.d_sae)
    return {
        "starts": np.concatenate([[0], np.cumsum(counts)]).astype(np.int64),
        "row": row[by_feature].astype(np.int32),
        "value": value[by_feature],
        "token": np.asarray(shard.token)[kept][order].astype(np.int32),
        "block": block[order].astype(np.int32),
        "offset": offset[order].astype(np.int32),
        **windows(corpus, block[order], offset[order], context_tokens),
    }


def _encode_rows(shard: Shard, rows: Int[np.ndarray, " n"], dictionary: Dictionary) -> tuple[np.ndarray, ...]:
    """Row (counted in `rows`), feature and value of every firing on the given rows of the shard."""
    found = []
    device = dictionary.W_enc.device
    for start in range(0, len(rows), _BATCH):
        acts = shard.acts[torch.from_numpy(rows[start : start + _BATCH])].to(device, torch.float32)
        sparse = dictionary.encode_sparse(acts)
        found.append((sparse.row.cpu() + start, sparse.feature.cpu(), sparse.value.float().cpu()))
    if not found:
        return np.empty(0, np.int64), np.empty(0, np.int64), np.empty(0, np.float32)
    return tuple(torch.cat(parts).numpy() for parts in zip(*found, strict=True))


def windows(
    corpus: Blocks, block: Int[np.ndarray, " n"], offset: Int[np.ndarray, " n"], context_tokens: int
) -> dict[str, np.ndarray]:
    """Window, context and hash of each token given by block and offset; `block` is sorted.

    The window is `context_tokens` long, with the token at about three quarters, moved or shortened to stay in the
    token's document and block.
    """
    blocks, of = np.unique(block, return_inverse=True)
    token_ids, documents = np.asarray(corpus.token_ids[blocks]), np.asarray(corpus.documents[blocks])
    first, last = extents(documents)
    low, high = first[of, offset], last[of, offset]
    start = np.maximum(low, np.minimum(offset - int(context_tokens * _BEFORE), high - context_tokens))
    stop = np.minimum(high, start + context_tokens)
    window = np.zeros(len(block), np.uint64)
    multipliers = np.random.default_rng(0).integers(1, 2**63, context_tokens, np.uint64) * 2 + 1
    for i, multiplier in enumerate(multipliers):
        place = start + i
        inside = place < stop
        token = token_ids[of, np.where(inside, place, 0)].astype(np.uint64) + 1
        window += np.where(inside, token, 0).astype(np.uint64) * multiplier  # modulo 2^64
    return {
        "start": start.astype(np.int32),
        "stop": stop.astype(np.int32),
        "context": block.astype(np.int64) * token_ids.shape[1] + low,
        "window": window.view(np.int64),
    }


def extents(
    documents: Int[np.ndarray, "blocks length"],
) -> tuple[Int64[np.ndarray, "blocks length"], Int64[np.ndarray, "blocks length"]]:
    """For each place of a block, where the run of its document begins, and the first place behind it."""
    n, length = documents.shape
    places = np.broadcast_to(np.arange(length), (n, length))
    changes = documents[:, 1:] != documents[:, :-1]
    edge = np.ones((n, 1), bool)
    first = np.maximum.accumulate(np.where(np.hstack([edge, changes]), places, 0), axis=1)
    ends = np.where(np.hstack([changes, edge]), places + 1, length)
    last = np.minimum.accumulate(ends[:, ::-1], axis=1)[:, ::-1]
    return first, np.ascontiguousarray(last)
