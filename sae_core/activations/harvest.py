"""Run the model over the corpus and write what it computes at the site."""

import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Float32, Float64
from safetensors.torch import save_file
from torch import Tensor

from sae_core.activations.elsewhere import DIGEST, ELSEWHERE, Elsewhere
from sae_core.activations.encoding import ActivationError, decode, encode, row_bytes
from sae_core.activations.passes import SPLITS, Part, load_model, parts_of, run_model, specials
from sae_core.activations.shards import RERUN, STATISTICS, Shard, Totals, shard_name, square_error
from sae_core.artifacts import require_space, write_atomically
from sae_core.language_model import LanguageModel
from sae_core.progress import Report, silent
from sae_core.study import ActivationSettings, ModelSettings

PLACE_BYTES = 13
"""What a row has beside its activation: block, offset and token of 4 bytes each, and the sink mark."""
_CHUNK = 1024
"""Rows compared at a time."""


class Plan(NamedTuple):
    """What every worker of a harvest has to know."""

    settings: ActivationSettings
    model: ModelSettings
    corpus: Path
    folder: Path
    elsewhere: str = ""
    """URL that takes the activations; empty when they stay in the shards."""
    others: tuple["Plan", ...] = ()
    """Of other sites, read in the same pass."""

    def lacking(self, name: str) -> list["Plan"]:
        """This one and the others, but for those that have the shard of that name."""
        return [plan for plan in (self, *self.others) if not (plan.folder / name).exists()]


class Worker:
    """The model, and what is needed to make one shard after another.

    A GPU goes on with the next shard while one is written; on a CPU that would only take turns on the same cores.
    """

    def __init__(self, plan: Plan, device: str) -> None:
        self.plan = plan
        self.lm = load_model([one.settings for one in (plan, *plan.others)], plan.model, device)
        self.parts = [part for split in SPLITS for part in parts_of(plan.settings, split, plan.corpus)]
        self.overlaps = self.lm.device.type != "cpu"
        self._writer = ThreadPoolExecutor(1)
        self._written: list[Future[None]] = []

    def make(self, number: int, advance: Callable[[int], None] = lambda n: None) -> int:
        """Make the shard of a part, unless it is there; returns its tokens. All need the first one's median norm."""
        part, first = self.parts[number], self.parts[0].name
        if not (self.plan.folder / part.name).exists():
            plans = [plan for plan in self.plan.lacking(part.name) if not number or (plan.folder / first).exists()]
            found = run_model([plan.settings for plan in plans], self.lm, part, advance)
            self.finish()  # no more than one waits to be written
            for plan, (shard, norms) in reversed(
                list(zip(plans, found, strict=True))
            ):  # its own at last: all are there
                median = Totals.read(plan.folder / first).median_norm if number else norms.median()[None]
                self._written.append(self._writer.submit(_write, plan, part.name, shard, norms, median))
            if not number or not self.overlaps:
                self.finish()
        return part.n_tokens

    def finish(self) -> None:
        """Wait until everything is written. Raises what writing raised."""
        while self._written:
            self._written.pop(0).result()

    def close(self) -> None:
        """Let what is being written come to its end."""
        self._writer.shutdown()


@runtime_checkable
class Pool(Protocol):
    """Several workers at once; see `sae_core.activations.parallel`."""

    def __call__(self, plan: Plan, numbers: Sequence[int], /) -> Iterator[int]:
        """Make the shards of the given parts; yields the tokens of each one that is done, in any order."""


def harvest(
    settings: ActivationSettings,
    model: ModelSettings,
    corpus: Path,
    folder: Path,
    device: str = "cpu",
    report: Report = silent,
    elsewhere: str = "",
    pool: Pool | None = None,
    others: Sequence[Plan] = (),
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
        report: told of tokens, and of the gigabytes that all shards will take.
        elsewhere: URL of a folder that is to take the activations, as fsspec knows them; the shards keep the rest.
        pool: makes the shards after the first, several at once; the bytes are the same.
        others: other sites of the model over the corpus, in folders of their own, that differ in nothing but hook and
            layer. Their shards are made in the same passes as these, as far as they are not there; their own harvest
            finds them, and has but to sum up.

    Returns:
        Counts, shares and norms, over both splits: `specials` are the special tokens left out, `sinks` the others;
        `estimated_bytes` is what was expected of `bytes`, and `kept_error` what is lost of their variance where
        activations are kept in another type than they are computed in.

    Raises:
        ModelError: the model or the site does not exist, or the blocks exceed the model's context.
        ActivationError: the corpus has tokens that the model lacks, an activation is not finite or more than float16
            holds, or the URL cannot be written to.
        ArtifactError: the disk has no room.
    """
    beside = tuple(_begun(other) for other in others)
    worker = Worker(_begun(Plan(settings, model, corpus, folder, elsewhere, beside)), device)
    plan, parts, done = worker.plan, worker.parts, 0
    estimate = _check(plan, worker.lm, parts)
    n_specials = sum(int(specials(settings, worker.lm, part).sum()) for part in parts)
    told = functools.partial(_tell, report, sum(part.n_tokens for part in parts), estimate / 1e9)
    for place in (plan, *plan.others):
        if place.elsewhere:
            with write_atomically(place.folder / ELSEWHERE) as path:
                path.write_text(json.dumps({"url": place.elsewhere.rstrip("/")}), "utf-8")
    alone = [n for n, part in enumerate(parts) if not n or not pool or (folder / part.name).exists()]
    with closing(worker):
        for number in alone:
            done += worker.make(number, functools.partial(told, done))
            told(0, done)
        worker.finish()
    del worker  # the pool needs its place on the device
    if pool and (rest := sorted(set(range(len(parts))) - set(alone))):
        for tokens in pool(plan, rest):
            told(0, done := done + tokens)
    if not settings.stored:
        said = {"settings": settings.model_dump(), "model": model.model_dump()}
        with write_atomically(folder / RERUN) as path:
            path.write_text(json.dumps(said | {"corpus": os.path.relpath(corpus, folder)}, indent=1), "utf-8")
    away = {"bytes_elsewhere": Elsewhere(plan.elsewhere).bytes()} if plan.elsewhere else {}
    return _finish(folder, parts, n_specials) | away | {"estimated_bytes": estimate}


def _begun(plan: Plan) -> Plan:
    """The plan with the URL that takes its activations; what was begun in one place goes on there."""
    plan.folder.mkdir(parents=True, exist_ok=True)
    if (plan.folder / ELSEWHERE).exists():
        return plan._replace(elsewhere=Elsewhere.of(plan.folder).url)
    begun = any((plan.folder / shard_name(split, 0)).exists() for split in SPLITS)
    return plan._replace(elsewhere=plan.elsewhere if plan.settings.stored and not begun else "")


def _tell(report: Report, total: int, gigabytes: float, before: int, done: int) -> None:
    report(before + done, total, "tokens", gigabytes=gigabytes)


def _check(plan: Plan, lm: LanguageModel, parts: list[Part]) -> int:
    """Refuse tokens that the model lacks, and a disk too small for the shards that are still to be written.

    Returns the bytes that all shards will take, wherever they go.
    """
    if not parts or parts[0].split != "train":
        raise ActivationError("the corpus has no train tokens: give it more text, or a smaller corpus.held_out")
    largest = max(int(part.token_ids.max()) for part in parts)
    if largest >= lm.vocab_size:
        raise ActivationError(f"the corpus has token {largest}, the model only {lm.vocab_size}: make the corpus again")
    row, head = row_bytes(plan.settings.dtype, lm.d_model) * plan.settings.stored, 8 * lm.d_model + 1024
    needed = 0
    for place in (plan, *plan.others):
        missing = [part.n_tokens for part in parts if not (place.folder / part.name).exists()]
        here = PLACE_BYTES + row * (not place.elsewhere)
        waiting = row * max(missing, default=0) * bool(place.elsewhere)  # the shard that is being sent away
        needed += sum(missing) * here + waiting + len(missing) * head
    require_space(plan.folder, needed)
    return sum(part.n_tokens for part in parts) * (row + PLACE_BYTES) + len(parts) * head


def _write(
    plan: Plan, name: str, shard: Shard, norms: Float32[Tensor, " tokens"], median: Float32[Tensor, " 1"]
) -> None:
    """Mark the sinks by their norm, sum up, and write; `median` is that of the first shard's norms."""
    shard = shard._replace(is_sink=shard.is_sink | (norms > plan.settings.sink_norm * median))
    kept = _encoded(plan.settings, name, shard)
    columns = shard._replace(acts=decode(kept))._asdict()
    columns |= Totals.of(Shard(**columns), norms, median)._asdict()
    if plan.settings.dtype != plan.settings.precision:
        columns["square_error"] = _square_error(shard, columns["acts"])
    del columns["acts"]
    if plan.elsewhere:
        with write_atomically(plan.folder / name) as temporary:
            save_file(kept, temporary)
            columns[DIGEST] = Elsewhere(plan.elsewhere).put(temporary, name)
            save_file(columns, temporary)
        return
    with write_atomically(plan.folder / name) as temporary:
        save_file(columns | (kept if plan.settings.stored else {}), temporary)


def _encoded(settings: ActivationSettings, name: str, shard: Shard) -> dict[str, Tensor]:
    try:
        return encode(shard.acts, shard.is_sink, settings.dtype)
    except ActivationError as error:
        raise ActivationError(f"{name}: {error}") from None


def _square_error(shard: Shard, kept: Float[Tensor, "tokens d_model"]) -> Float64[Tensor, " 1"]:
    """Summed over the rows that are no sinks."""
    chunks = zip(shard.acts.split(_CHUNK), kept.split(_CHUNK), (~shard.is_sink).split(_CHUNK), strict=True)
    norms = [torch.linalg.vector_norm(a.float() - b.float(), dim=1)[keep] for a, b, keep in chunks]
    return torch.cat(norms).double().square().sum()[None]


def _finish(folder: Path, parts: list[Part], n_specials: int) -> dict[str, int | float]:
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
    variance = float(n_train * (mean_square_norm - mean.square().sum()))
    lost = [error for part in parts if part.split == "train" for error in square_error(folder / part.name)]
    tokens = sum(part.n_tokens for part in parts)
    sinks = tokens - n_specials - sum(int(t.n_kept) for t in totals.values())
    return {
        "tokens": tokens,
        "train_tokens": sum(part.n_tokens for part in parts if part.split == "train"),
        "sinks": sinks,
        "sink_share": sinks / tokens,
        "specials": n_specials,
        "special_share": n_specials / tokens,
        "median_norm": float(train[0].median_norm),
        "root_mean_square_norm": float(mean_square_norm.sqrt()),
        "d_model": len(mean),
        "shards": len(parts),
        "bytes": sum((folder / part.name).stat().st_size for part in parts),
    } | ({"kept_error": sum(lost) / variance} if lost else {})
