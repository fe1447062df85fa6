"""The shard files, and their reader: in order, in shuffled batches, or one by one."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Float32, Float64, Int, Int32, Int64
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sae_core.activations.elsewhere import ELSEWHERE, Copies
from sae_core.activations.encoding import COLUMNS, EVERY, ActivationError, Rows, decode

Split = Literal["train", "held_out"]

SHUFFLE_BYTES = 512 << 20
"""Activations that `Activations.batches` holds in memory and mixes: as many shards as fit, and at least two. A GPU
holds more, see `_shuffle_bytes`."""
STATISTICS = "statistics.safetensors"
RERUN = "rerun.json"
"""There when the activations themselves are not: what the model needs to compute them again."""
_CHUNK = 8192
"""Rows turned into float64 at a time."""
_READ_AHEAD = 1 << 20


@runtime_checkable
class Acts(Protocol):
    """Gives the activations of the shard of a number, or some of its rows."""

    def __call__(self, number: int, rows: Rows = EVERY, /) -> Float[Tensor, "tokens *site d_model"]: ...


@runtime_checkable
class Text(Protocol):
    """A split's blocks, as `sae_core.corpus.Blocks` has them."""

    documents: Int32[np.ndarray, "blocks length"]
    positions: Int32[np.ndarray, "blocks length"]


class Shard(NamedTuple):
    """Activations in shuffled order, and for each the place and the token that it belongs to."""

    acts: Float[Tensor, "tokens *site d_model"]
    block: Int32[Tensor, " tokens"]
    offset: Int32[Tensor, " tokens"]
    token: Int32[Tensor, " tokens"]
    is_sink: Bool[Tensor, " tokens"]


class Totals(NamedTuple):
    """Sums over a shard's rows, sinks left out; stored with the rows, so that nobody needs to read them again."""

    kept_sum: Float64[Tensor, " d_model"]
    kept_square_norm: Float64[Tensor, " 1"]
    n_kept: Int64[Tensor, " 1"]
    median_norm: Float32[Tensor, " 1"]
    """Median norm in the first train shard: what sinks are measured by in every shard."""

    @classmethod
    def of(cls, shard: Shard, norms: Float32[Tensor, " tokens"], median: Float32[Tensor, " 1"]) -> "Totals":
        """The totals of a shard whose rows have the given norms."""
        kept = ~shard.is_sink
        chunks = zip(shard.acts.split(_CHUNK), kept.split(_CHUNK), strict=True)
        kept_sum = torch.stack([acts[keep].double().sum(0) for acts, keep in chunks]).sum(0)
        return cls(kept_sum, norms[kept].double().square().sum()[None], kept.sum()[None], median)

    @classmethod
    def read(cls, path: Path) -> "Totals":
        """The totals in a shard's file. Raises ActivationError when it is missing or damaged."""
        return cls(**_tensors(path, cls._fields))


class Statistics(NamedTuple):
    """Of the train split's activations, sinks left out; of two sites, a row for each."""

    mean: Float32[Tensor, "*site d_model"]
    mean_square_norm: Float32[Tensor, " sites"]


class Files:
    """Activations that lie in files; `path` says where each shard's are, and sees to it that they are there."""

    def __init__(self, path: Callable[[int], Path]) -> None:
        self._path = path

    def acts(self, number: int, rows: Rows = EVERY, /) -> Float[Tensor, "tokens d_model"]:
        """The activations of a shard. Raises ActivationError when they cannot be read."""
        return decode(_tensors(self._path(number), COLUMNS[:1], COLUMNS[1:]), rows)

    def ahead(self, number: int) -> None:
        """Read a shard for nothing but to have it in the system's memory when it is asked for."""
        buffer = bytearray(_READ_AHEAD)
        with suppress(OSError, ActivationError), self._path(number).open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


class Group(NamedTuple):
    """Shards that are mixed."""

    shards: list[int]
    key: tuple[int, int]
    """Of the permutation of their rows."""
    skip: int
    """Rows of it that are left out."""


class Activations:
    """One split of a site's activations. Files are memory-mapped, and only while they are read.

    Where the activations themselves were not stored, the model computes them again, shard by shard.

    Attributes:
        n_tokens: rows, sinks included.
        n_kept: rows, sinks left out.
        d_model: width of an activation.
    """

    def __init__(
        self,
        folder: Path,
        paths: list[Path],
        acts: Acts,
        device: str = "cpu",
        ahead: Callable[[int], None] = lambda number: None,
    ) -> None:
        """`ahead` is told of a shard some time before `acts` is asked for it, in a thread of its own."""
        self.folder, self.paths, self.acts, self.device, self.ahead = folder, paths, acts, device, ahead
        totals = [Totals.read(path) for path in paths]
        self._kept = [int(t.n_kept) for t in totals]
        self._sizes = [len(_tensors(path, ("is_sink",))["is_sink"]) for path in paths]
        self.n_tokens, self.n_kept, self.d_model = sum(self._sizes), sum(self._kept), len(totals[0].kept_sum)

    @classmethod
    def open(cls, folder: Path, split: Split = "train", device: str = "cpu") -> "Activations":
        """The split's shards; `device` is where batches are put together, and where the model runs if it has to.

        Raises ActivationError when there are none, one is missing, or one is damaged.
        """
        paths = sorted(folder.glob(f"{split}-*.safetensors"))
        if not paths:
            raise ActivationError(f"{folder} holds no {split} activations: run the activations stage")
        for number, path in enumerate(paths):
            if path.name != shard_name(split, number):
                raise ActivationError(f"{folder} lacks {shard_name(split, number)}: run the activations stage again")
        if (folder / RERUN).exists():
            from sae_core.activations.rerun import Rerun  # brings the model library, which reading does not need

            return cls(folder, paths, Rerun(folder / RERUN, split, device).acts, device)
        files = Files(Copies(folder, paths).path if (folder / ELSEWHERE).exists() else paths.__getitem__)
        return cls(folder, paths, files.acts, device, files.ahead)

    def statistics(self) -> Statistics:
        """Mean and mean square norm of the train split, sinks left out."""
        return Statistics(**_tensors(self.folder / STATISTICS, Statistics._fields))

    def shards(self) -> Iterator[Shard]:
        """The shards in order, sinks included."""
        return map(self._shard, range(len(self.paths)))

    def first_broken(self) -> str:
        """File and row of the first activation that is not finite; empty when all are."""
        for path, shard in zip(self.paths, self.shards(), strict=True):
            for chunk, acts in enumerate(shard.acts.split(_CHUNK)):
                if len(rows := (~acts.isfinite()).flatten(1).any(dim=1).nonzero()):
                    return f"{path.name}, row {chunk * _CHUNK + int(rows[0])}"
        return ""

    def rows(self, block: Int[Tensor, " tokens"], offset: Int[Tensor, " tokens"]) -> Float[Tensor, "tokens d_model"]:
        """The activations at the given places. Raises ActivationError when one of them is not stored."""
        row = self._find(block.long(), offset.long())
        ends = torch.tensor(self._sizes).cumsum(0)
        shard_of = torch.searchsorted(ends, row, right=True)
        starts = ends - torch.tensor(self._sizes)
        numbers = shard_of.unique().tolist() or [0]  # no place at all gives no row of the first shard
        found = [self.acts(number, row[shard_of == number] - starts[number]) for number in numbers]
        order = shard_of.argsort(stable=True)
        return torch.cat(found)[order.argsort()]

    def at(self, blocks: Text, document: int, tokens: Sequence[int]) -> Float[Tensor, "tokens d_model"]:
        """The activations of a document's tokens, counted from 0; `blocks` are the corpus's, of the same split.

        Where a token stands in several blocks (the first one, repeated where a document goes on), the first counts.

        Raises ActivationError when the split has no such token.
        """
        block, offset = (torch.from_numpy(where) for where in (blocks.documents == document).nonzero())
        found = {int(p): n for n, p in reversed(list(enumerate(blocks.positions[block, offset])))}
        if lacking := [token for token in tokens if token not in found]:
            raise ActivationError(f"document {document} has no token {lacking[0]} here: it has {len(found)} tokens")
        n = torch.tensor([found[token] for token in tokens], dtype=torch.long)
        return self.rows(block[n], offset[n])

    def batches(
        self, batch_tokens: int, n_steps: int, seed: int, start_step: int = 0
    ) -> Iterator[Float[Tensor, "batch *site d_model"]]:
        """Batches for the steps from `start_step` to before `n_steps`, sinks left out, in the stored type.

        They are cut from an endless row of epochs, each in a new order: the shards are permuted, and the rows of as
        many shards as `SHUFFLE_BYTES` holds are shuffled together. The order depends on the seed alone, and to start
        late costs no more than to start.
        """
        if not self.n_kept:
            raise ActivationError(f"{self.folder} holds attention sinks only: give more text")
        endless = self._endless(batch_tokens, seed, start_step * batch_tokens)
        yield from itertools.islice(endless, max(0, n_steps - start_step))

    def _endless(self, batch_tokens: int, seed: int, skip: int) -> Iterator[Float[Tensor, "batch *site d_model"]]:
        pieces: list[Tensor] = []
        lacking = batch_tokens
        for group, order in self._groups(seed, skip):
            while len(order):
                picked, order = order[:lacking], order[lacking:]
                pieces.append(group[picked])
                lacking -= len(picked)
                if not lacking:
                    yield torch.cat(pieces)
                    pieces, lacking = [], batch_tokens

    def _groups(
        self, seed: int, skip: int
    ) -> Iterator[tuple[Float[Tensor, "rows *site d_model"], Int64[Tensor, " picked"]]]:
        """Kept rows of a few shards, and the order to take them in, without the first `skip`; one buffer for all.

        When all shards fit, they are read once, and stay. Else the next ones are read ahead while these are used.
        """
        some = self.acts(0, slice(1))
        size = max(2, _shuffle_bytes(self.device) // (max(self._sizes) * some[0].numel() * some.element_size()))
        buffer = some.new_empty(min(size * max(self._kept), self.n_kept), *some.shape[1:], device=self.device)
        inside: list[int] = []
        reader = ThreadPoolExecutor(1)
        try:
            for now, following in itertools.pairwise(self._plan(size, seed, skip)):
                n = sum(self._kept[shard] for shard in now.shards)
                if now.shards != inside:
                    self._load(inside := now.shards, buffer[:n])
                for shard in set(following.shards) - set(inside):
                    reader.submit(self.ahead, shard)
                yield buffer[:n], permutation(n, seed, *now.key)[now.skip :]
        finally:
            reader.shutdown(wait=False, cancel_futures=True)

    def _plan(self, size: int, seed: int, skip: int) -> Iterator[Group]:
        """Which shards are mixed, `size` at a time, epoch after epoch, without the first `skip` rows."""
        first, skip = divmod(skip, self.n_kept)
        for epoch in itertools.count(first):
            for number, group in enumerate(permutation(len(self.paths), seed, epoch, 0).split(size)):
                n = sum(self._kept[shard] for shard in group.tolist())
                if skip < n:
                    yield Group(sorted(group.tolist()), (epoch, 1 + number), skip)
                skip = max(0, skip - n)

    def _load(self, group: list[int], out: Float[Tensor, "rows *site d_model"]) -> None:
        """Copy the kept rows of the shards into `out`."""
        for shard, rows in zip(group, out.split([self._kept[shard] for shard in group]), strict=True):
            rows.copy_(self.acts(shard, ~self.places(shard)["is_sink"]))

    def places(self, number: int) -> dict[str, Tensor]:
        """What a shard holds beside its activations, as `Shard` names it."""
        return _tensors(self.paths[number], Shard._fields[1:])

    def _shard(self, number: int) -> Shard:
        return Shard(acts=self.acts(number), **self.places(number))

    def _find(self, block: Int64[Tensor, " tokens"], offset: Int64[Tensor, " tokens"]) -> Int64[Tensor, " tokens"]:
        """Row of each place, counted over all shards."""
        stored = self._row_at
        known = (block >= 0) & (block < stored.shape[0]) & (offset >= 0) & (offset < stored.shape[1])
        row = torch.where(known, stored[block * known, offset * known], -1)
        if len(lacking := (row < 0).nonzero()):
            at = int(lacking[0])
            raise ActivationError(f"no activation is stored for block {int(block[at])}, offset {int(offset[at])}")
        return row

    @cached_property
    def _row_at(self) -> Int64[Tensor, "blocks length"]:
        """Row, counted over all shards, of each block and offset; -1 where none is stored. 8 bytes a token."""
        places = [_tensors(path, ("block", "offset")) for path in self.paths]
        block, offset = (torch.cat([place[name] for place in places]).long() for name in ("block", "offset"))
        table = torch.full((int(block.max()) + 1, int(offset.max()) + 1), -1)
        table[block, offset] = torch.arange(len(block))
        return table


def _shuffle_bytes(device: str) -> int:
    """Memory for the rows that are mixed: on a GPU, half of what is free there, where they need not be copied again."""
    return max(SHUFFLE_BYTES, torch.cuda.mem_get_info(device)[0] // 2) if device.startswith("cuda") else SHUFFLE_BYTES


def shard_name(split: Split, number: int) -> str:
    """File name of a shard."""
    return f"{split}-{number:05d}.safetensors"


def square_error(path: Path) -> list[float]:
    """What a shard lost by the type it is kept in, if that is another than the activations were computed in."""
    return [float(error) for error in _tensors(path, (), ("square_error",)).values()]


def permutation(n: int, *key: int) -> Int64[Tensor, " n"]:
    """Random order of n things, the same for the same key."""
    return torch.from_numpy(np.random.default_rng([part % 2**64 for part in key]).permutation(n))


def _tensors(path: Path, names: tuple[str, ...], optional: tuple[str, ...] = ()) -> dict[str, Any]:
    """Tensors of a safetensors file, memory-mapped."""
    try:
        with safe_open(path, framework="pt") as file:
            there = set(file.keys())
            return {name: file.get_tensor(name) for name in (*names, *(n for n in optional if n in there))}
    except (OSError, SafetensorError) as error:
        raise ActivationError(
            f"{path} cannot be read ({error}): delete it, and run the activations stage again"
        ) from None
