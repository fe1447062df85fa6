"""Run the model over the corpus and write what it computes at the site."""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float32, Int
from safetensors.torch import save_file
from torch import Tensor

from sae_core.activations.shards import (
    RERUN,
    STATISTICS,
    ActivationError,
    Shard,
    Split,
    Totals,
    permutation,
    shard_name,
)
from sae_core.artifacts import require_space, write_atomically
from sae_core.corpus import Corpus
from sae_core.corpus.packing import kept_apart
from sae_core.language_model import LanguageModel, places
from sae_core.progress import Report, silent
from sae_core.study import ActivationSettings, ModelSettings

BATCH_TOKENS = {"cpu": 4096, "cuda": 65_536}
"""Tokens a forward pass at most, by kind of device; see benchmarks/harvest.py. Fewer where a GPU's memory ends."""
PLACE_BYTES = 13
"""What a row has beside its activation: block, offset and token of 4 bytes each, and the sink mark."""


class Part(NamedTuple):
    """What one shard is made from."""

    split: Split
    number: int
    blocks: Int[Tensor, " blocks"]
    """Which of the split's blocks."""
    token_ids: Int[Tensor, "blocks length"]
    documents: Int[Tensor, "blocks length"]

    @property
    def name(self) -> str:
        return shard_name(self.split, self.number)

    @property
    def n_tokens(self) -> int:
        return int((self.documents >= 0).sum())


def harvest(
    settings: ActivationSettings,
    model: ModelSettings,
    corpus: Path,
    folder: Path,
    device: str = "cpu",
    report: Report = silent,
) -> dict[str, int | float]:
    """Run the model over the corpus and write the activations at the site; goes on after the shards that are there.

    Attention and positions restart at each document, so that an activation does not depend on what else its block
    holds, unless `packing` says otherwise. Tokens whose norm exceeds `sink_norm` medians are marked as attention sinks;
    with them, what is left out for its place or because it is no text (`sink_positions`, `special_tokens`).

    Args:
        settings: site, precision, sinks and shards.
        model: the language model.
        corpus: folder of the finished corpus.
        folder: takes `train-*.safetensors`, `held_out-*.safetensors` and `statistics.safetensors`; and `rerun.json`
            when the activations are not to be stored.
        device: where the model runs.
        report: told of tokens.

    Returns:
        Counts, shares and norms, over both splits: `specials` are the special tokens left out, `sinks` the others.

    Raises:
        ModelError: the model or the site does not exist, or the blocks exceed the model's context.
        ActivationError: the corpus has tokens that the model lacks, or an activation is not finite.
        ArtifactError: the disk has no room.
    """
    parts = [*parts_of(settings, "train", corpus), *parts_of(settings, "held_out", corpus)]
    lm = LanguageModel.load(model, device, settings.precision)
    _check(settings, lm, folder, parts)
    specials = sum(int(_specials(settings, lm, part).sum()) for part in parts)
    done, total = 0, sum(part.n_tokens for part in parts)
    for part in parts:
        path = folder / part.name
        if not path.exists():
            shard, norms = run_model(settings, lm, part, _continued(report, done, total))
            _write(settings, path, shard, norms, None if part is parts[0] else Totals.read(folder / parts[0].name))
        done += part.n_tokens
        report(done, total, "tokens")
    if not settings.stored:
        said = {"settings": settings.model_dump(), "model": model.model_dump()}
        with write_atomically(folder / RERUN) as path:
            path.write_text(json.dumps(said | {"corpus": os.path.relpath(corpus, folder)}, indent=1), "utf-8")
    return _finish(folder, parts, specials)


def parts_of(settings: ActivationSettings, split: Split, corpus: Path) -> Iterator[Part]:
    """Deal the blocks out to shards, in an order that the seed decides."""
    opened = Corpus.open(corpus)
    blocks = opened.train if split == "train" else opened.held_out
    token_ids, documents = torch.as_tensor(blocks.token_ids), torch.as_tensor(blocks.documents)
    if not len(token_ids):
        return
    order = permutation(len(token_ids), settings.seed, split == "held_out", 0)
    for number, chosen in enumerate(order.split(max(1, settings.shard_tokens // token_ids.shape[1]))):
        yield Part(split, number, chosen, token_ids[chosen], documents[chosen])


def _check(settings: ActivationSettings, lm: LanguageModel, folder: Path, parts: list[Part]) -> None:
    """Refuse tokens that the model lacks, and a disk too small for the shards that are still to be written."""
    if not parts or parts[0].split != "train":
        raise ActivationError("the corpus has no train tokens: give it more text, or a smaller corpus.held_out")
    largest = max(int(part.token_ids.max()) for part in parts)
    if largest >= lm.vocab_size:
        raise ActivationError(f"the corpus has token {largest}, the model only {lm.vocab_size}: make the corpus again")
    row = lm.d_model * getattr(torch, settings.precision).itemsize * settings.stored + PLACE_BYTES
    missing = sum(part.n_tokens for part in parts if not (folder / part.name).exists())
    require_space(folder, missing * row + len(parts) * (8 * lm.d_model + 1024))


def _continued(report: Report, before: int, total: int) -> Callable[[int], None]:
    return lambda n: report(before + n, total, "tokens")


def run_model(
    settings: ActivationSettings, lm: LanguageModel, part: Part, advance: Callable[[int], None] = lambda n: None
) -> tuple[Shard, Float32[Tensor, " tokens"]]:
    """The part's activations and their norms, in shuffled order; marked are the sinks that are so whatever their norm.

    Raises ActivationError when an activation is not finite, or a single block does not fit into the GPU's memory.
    """
    real = part.documents >= 0
    place = permutation(part.n_tokens, settings.seed, part.split == "held_out", 1 + part.number)
    acts = torch.empty(len(place), lm.d_model, dtype=getattr(torch, settings.precision))
    norms, done = torch.empty(len(place)), 0
    segments = kept_apart(part.documents, settings.packing)
    for rows, x in _in_batches(settings, lm, part.token_ids, segments):
        x = x.cpu()[real[rows]]
        to = place[done : done + len(x)]
        acts[to], norms[to] = x, torch.linalg.vector_norm(x, dim=1, dtype=torch.float32)
        if not norms[to].isfinite().all():
            raise _not_finite(settings, part, rows)
        done += len(x)
        advance(done)
    block, offset = real.nonzero().unbind(1)

    def shuffled(column: Tensor) -> Tensor:
        return torch.empty_like(place, dtype=torch.int32).index_copy_(0, place, column.int())

    attended = torch.zeros_like(part.documents) if segments is None else segments
    out = (_specials(settings, lm, part) | (places(attended) < settings.sink_positions))[real]
    return Shard(
        acts, shuffled(part.blocks[block]), shuffled(offset), shuffled(part.token_ids[real]), shuffled(out).bool()
    ), norms


def _in_batches(
    settings: ActivationSettings,
    lm: LanguageModel,
    token_ids: Int[Tensor, "blocks length"],
    segments: Int[Tensor, "blocks length"] | None,
) -> Iterator[tuple[slice, Float[Tensor, "batch length d_model"]]]:
    """Activations of a few blocks at a time: of half as many whenever the GPU's memory does not hold them."""
    at, batch = 0, min(len(token_ids), max(1, BATCH_TOKENS[lm.device.type] // token_ids.shape[1]))
    while at < len(token_ids):
        rows = slice(at, at + batch)
        try:
            x = lm.capture(settings.hook, settings.layer, token_ids[rows], None if segments is None else segments[rows])
        except torch.cuda.OutOfMemoryError:
            if batch == 1:
                raise ActivationError(
                    f"a block of {token_ids.shape[1]} tokens does not fit into the GPU's memory beside the model: "
                    "give fewer corpus.block_tokens, or a smaller model"
                ) from None
            batch //= 2
            continue
        yield rows, x
        at += batch


def _specials(settings: ActivationSettings, lm: LanguageModel, part: Part) -> Bool[Tensor, "blocks length"]:
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


def _write(
    settings: ActivationSettings, path: Path, shard: Shard, norms: Float32[Tensor, " tokens"], first: Totals | None
) -> None:
    """Mark the sinks by their norm, sum up, and write.

    Without a first shard's totals this is the first, and sets the median.
    """
    median = norms.median()[None] if first is None else first.median_norm
    shard = shard._replace(is_sink=shard.is_sink | (norms > settings.sink_norm * median))
    columns = shard._asdict() | Totals.of(shard, norms, median)._asdict()
    if not settings.stored:
        del columns["acts"]
    with write_atomically(path) as temporary:
        save_file(columns, temporary)


def _finish(folder: Path, parts: list[Part], specials: int) -> dict[str, int | float]:
    """Write the train split's statistics; return the summary."""
    totals = {part.name: Totals.read(folder / part.name) for part in parts}
    train = [totals[part.name] for part in parts if part.split == "train"]
    n_train = sum(int(t.n_kept) for t in train)
    if not n_train:
        raise ActivationError(
            "every train token is an attention sink or a special token: give more text, or raise activations.sink_norm"
        )
    mean = torch.stack([t.kept_sum for t in train]).sum(0) / n_train
    mean_square_norm = torch.stack([t.kept_square_norm for t in train]).sum(0) / n_train
    with write_atomically(folder / STATISTICS) as temporary:
        save_file({"mean": mean.float(), "mean_square_norm": mean_square_norm.float()}, temporary)
    tokens = sum(part.n_tokens for part in parts)
    sinks = tokens - specials - sum(int(t.n_kept) for t in totals.values())
    return {
        "tokens": tokens,
        "train_tokens": sum(part.n_tokens for part in parts if part.split == "train"),
        "sinks": sinks,
        "sink_share": sinks / tokens,
        "specials": specials,
        "special_share": specials / tokens,
        "median_norm": float(train[0].median_norm),
        "root_mean_square_norm": float(mean_square_norm.sqrt()),
        "d_model": len(mean),
        "shards": len(parts),
        "bytes": sum((folder / part.name).stat().st_size for part in parts),
    }
