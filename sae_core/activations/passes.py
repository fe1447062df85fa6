"""Passes of the model over a corpus: what it computes at the sites, part by part, in shuffled order."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import get_args

import torch
from jaxtyping import Bool, Float, Float32, Int
from safetensors.torch import load_file
from torch import Tensor

from sae_core.activations.encoding import ActivationError
from sae_core.activations.shards import Shard, Split, permutation, shard_name
from sae_core.corpus.packing import kept_apart
from sae_core.language_model import LanguageModel, places
from sae_core.study import ActivationSettings, ModelSettings

BATCH_TOKENS = {"cpu": 4096, "cuda": 65_536}
"""Tokens a forward pass at most, by kind of device; see benchmarks/harvest.py. Fewer where a GPU's memory ends."""
SPLITS: tuple[Split, ...] = get_args(Split)


@dataclass(frozen=True)
class Part:
    """What one shard is made from; the text stays on disk until it is asked for."""

    split: Split
    number: int
    blocks: Int[Tensor, " blocks"]
    """Which of the split's blocks."""
    text: dict[str, Int[Tensor, "n_blocks length"]]
    """The whole split, memory-mapped."""

    @property
    def name(self) -> str:
        return shard_name(self.split, self.number)

    @property
    def token_ids(self) -> Int[Tensor, "blocks length"]:
        return self.text["token_ids"][self.blocks]

    @property
    def documents(self) -> Int[Tensor, "blocks length"]:
        return self.text["documents"][self.blocks]

    @cached_property
    def n_tokens(self) -> int:
        return int((self.documents >= 0).sum())


def load_model(sites: Sequence[ActivationSettings], model: ModelSettings, device: str) -> LanguageModel:
    """The model as it is run to read these sites, which differ in hook and layer alone."""
    lm = LanguageModel.load(model, device, sites[0].precision)
    if sites[0].compiled:
        lm.compile({site.layer for site in sites})
    return lm


def parts_of(settings: ActivationSettings, split: Split, corpus: Path) -> Iterator[Part]:
    """Deal the blocks out to shards, in an order that the seed decides."""
    text = load_file(corpus / f"{split}.safetensors")  # memory-mapped: a corpus may be larger than memory
    n_blocks, length = text["token_ids"].shape
    order = permutation(n_blocks, settings.seed, split == "held_out", 0)
    for number, chosen in enumerate(order.split(max(1, settings.shard_tokens // length)) if n_blocks else ()):
        yield Part(split, number, chosen, text)


def run_model(
    sites: Sequence[ActivationSettings], lm: LanguageModel, part: Part, advance: Callable[[int], None] = lambda n: None
) -> list[tuple[Shard, Float32[Tensor, " tokens"]]]:
    """The part's activations and their norms, in shuffled order; marked are the sinks that are so whatever their norm.

    So at each of the sites, which differ in hook and layer alone, from one pass of the model.

    Raises ActivationError when an activation is not finite, or a single block does not fit into the GPU's memory.
    """
    settings, token_ids, documents = sites[0], part.token_ids, part.documents
    real = documents >= 0
    place = permutation(part.n_tokens, settings.seed, part.split == "held_out", 1 + part.number)
    acts = [torch.empty(len(place), lm.d_model, dtype=getattr(torch, settings.precision)) for _ in sites]
    norms, done = [torch.empty(len(place)) for _ in sites], 0
    segments = kept_apart(documents, settings.packing)
    for rows, found in _landed(_in_batches(sites, lm, token_ids, segments), lm.device):
        kept = real[rows]
        to = place[done : done + int(kept.sum())]
        for site, x, into, lengths in zip(sites, found, acts, norms, strict=True):
            into[to] = x = x[kept]
            lengths[to] = torch.linalg.vector_norm(x, dim=1, dtype=torch.float32)
            if not lengths[to].isfinite().all():
                raise _not_finite(site, part, rows)
        done += len(to)
        advance(done)
    block, offset = real.nonzero().unbind(1)

    def shuffled(column: Tensor) -> Tensor:
        return torch.empty_like(place, dtype=torch.int32).index_copy_(0, place, column.int())

    attended = torch.zeros_like(documents) if segments is None else segments
    out = (specials(settings, lm, part) | (places(attended) < settings.sink_positions))[real]
    places_of = shuffled(part.blocks[block]), shuffled(offset), shuffled(token_ids[real]), shuffled(out).bool()
    return [(Shard(x, *places_of), lengths) for x, lengths in zip(acts, norms, strict=True)]


def _in_batches(
    sites: Sequence[ActivationSettings],
    lm: LanguageModel,
    token_ids: Int[Tensor, "blocks length"],
    segments: Int[Tensor, "blocks length"] | None,
) -> Iterator[tuple[slice, list[Float[Tensor, "batch length d_model"]]]]:
    """Activations of a few blocks at a time: of half as many whenever the GPU's memory does not hold them."""
    wanted = [(site.hook, site.layer) for site in sites]
    at, batch = 0, min(len(token_ids), max(1, BATCH_TOKENS[lm.device.type] // token_ids.shape[1]))
    while at < len(token_ids):
        rows = slice(at, at + batch)
        try:
            found = lm.capture_many(wanted, token_ids[rows], None if segments is None else segments[rows])
        except torch.cuda.OutOfMemoryError:
            if batch == 1:
                raise ActivationError(
                    f"a block of {token_ids.shape[1]} tokens does not fit into the GPU's memory beside the model: "
                    "give fewer corpus.block_tokens, or a smaller model"
                ) from None
            batch //= 2
            continue
        yield rows, found
        at += batch


def _landed(
    batches: Iterable[tuple[slice, list[Tensor]]], device: torch.device
) -> Iterator[tuple[slice, list[Tensor]]]:
    """The batches on the CPU. A GPU computes the next one while one is copied, and while the caller uses the last one.

    Copies go to page-locked memory, which torch takes again for later batches.
    """
    if device.type != "cuda":
        yield from ((rows, [x.cpu() for x in found]) for rows, found in batches)
        return
    aside, under_way = torch.cuda.Stream(device), deque[tuple[slice, list[Tensor], torch.cuda.Event]]()
    for rows, found in batches:
        under_way.append((rows, *_copied(found, aside)))
        if len(under_way) > 1:
            yield _arrived(*under_way.popleft())
    while under_way:
        yield _arrived(*under_way.popleft())


def _copied(found: list[Tensor], aside: torch.cuda.Stream) -> tuple[list[Tensor], torch.cuda.Event]:
    """Begin to copy what the GPU's current stream computes, on a stream aside; the event tells when it is there."""
    aside.wait_stream(torch.cuda.current_stream(aside.device))
    with torch.cuda.stream(aside):
        copies = [torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True) for x in found]
    for x in found:
        x.record_stream(aside)  # its memory is not to be used anew before it is copied
    return copies, aside.record_event()


def _arrived(rows: slice, copies: list[Tensor], there: torch.cuda.Event) -> tuple[slice, list[Tensor]]:
    there.synchronize()
    return rows, copies


def specials(settings: ActivationSettings, lm: LanguageModel, part: Part) -> Bool[Tensor, "blocks length"]:
    """The special tokens that are left out."""
    if settings.special_tokens == "keep":
        return torch.zeros_like(part.documents, dtype=torch.bool)
    return lm.is_special(part.token_ids, places(part.documents)) & (part.documents >= 0)


def _not_finite(settings: ActivationSettings, part: Part, rows: slice) -> ActivationError:
    cure = '"bfloat16" or "float32"' if settings.precision == "float16" else '"float32"'
    blocks = part.blocks[rows].tolist()
    return ActivationError(
        f"{part.name}: NaN or infinity in the activations of {part.split} blocks {', '.join(map(str, blocks))}: "
        f"set activations.precision = {cure}, or read another layer"
    )
