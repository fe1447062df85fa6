"""The atlas stage: a generation is served only when it is no worse than the one before.

The challenger is what the stages made last; the champion is the generation that is served. Both dictionaries are
measured on the same activations: those of the challenger's held-out documents, and a sample of the champion's, so that
a corpus that has gone bad cannot be its own judge.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_core.activations import Activations
from sae_core.activations.pair import open_sites
from sae_core.artifacts import ArtifactStore, Made, fingerprint_of, second, write_atomically
from sae_core.checks import Verdict
from sae_core.dictionary import Dictionary
from sae_core.errors import MindAtlasError
from sae_core.generations import Snapshot, followed, refusal, refuse, write_generation
from sae_core.lineage import LINEAGE
from sae_core.metrics import measure
from sae_core.study import RetrainingSettings
from sae_core.training import at_l0

REPORT, COMPARISON, REFERENCE = "report.md", "comparison.json", "held_out.safetensors"
REFERENCE_TOKENS = 8192
"""Held-out activations kept with a generation, for its successors to be measured on."""


class Refused(MindAtlasError):
    """A challenger that is worse than what is served; nothing was replaced."""


class Line(NamedTuple):
    """One number, of the champion and of the challenger."""

    name: str
    champion: float
    challenger: float
    bound: float
    """What the challenger's may be at most (or, of what is better the larger, at least)."""
    passed: bool


def build_atlas(
    settings: RetrainingSettings, parents: dict[str, Made], store: ArtifactStore, folder: Path, verdicts: list[Verdict]
) -> dict[str, Any]:
    """Compare the newest artifacts with what is served, and write them down as a generation.

    Args:
        settings: how much worse than the champion a challenger may be.
        parents: the finished stages of the challenger, by stage.
        store: where the champion lies.
        folder: takes `generation.json`, `report.md`, `comparison.json` and `held_out.safetensors`.
        verdicts: of the challenger's own asset checks.

    Returns:
        The generation's number, whether there was a champion, and the share of its features that were kept.

    Raises:
        Refused: the challenger fails a check or is worse; the reasons are in the message, and in `report.md`.
    """
    slug = parents["dictionary"].manifest.slug
    before = followed(store, slug, fingerprint_of(folder))
    champion = Snapshot(store.root, before) if before else None
    written = second(parents, "activations")
    sample = _sample(open_sites(parents["activations"].folder, written, "held_out"))
    lines = _own(verdicts)
    is_same = champion is not None and champion.generation.holds(parents["dictionary"].manifest.fingerprint)
    fates = Counter() if is_same else _fates(parents["dictionary"].folder)  # what became of them was told before
    if champion:
        reference = load_file(champion.generation.folder / REFERENCE)["acts"]
        old = Dictionary.load(champion.get("dictionary", slug).folder)
        new = Dictionary.load(parents["dictionary"].folder)
        lines += _compare(settings, old, new, {"its own": sample, "the served": reference}, fates)
    failed = [line for line in lines if not line.passed]
    _write_report(folder, champion, parents, lines, fates)
    if failed:
        refuse(store, slug, refusal(fingerprint_of(folder), settings), "; ".join(line.name for line in failed))
        why = "; ".join(f"{line.name}: {line.challenger:.4g}, wanted {line.bound:.4g}" for line in failed)
        raise Refused(
            f"{slug} is not promoted, what is served stays ({why}); see {folder / REPORT}, and loosen [retraining] or "
            "[checks] if this is wanted"
        )
    with write_atomically(folder / REFERENCE) as path:
        save_file({"acts": sample}, path)
    generation = write_generation(store, slug, parents, folder)
    return {
        "generation": generation.number,
        "first": champion is None,
        "kept_share": _kept_share(fates),
        **dict(sorted(fates.items())),
    }


def _sample(activations: Activations) -> Float[Tensor, "tokens *site d_model"]:
    """The first held-out activations that are no sinks; their shards are shuffled."""
    kept, n = [], 0
    for shard in activations.shards():
        kept.append(shard.acts[~shard.is_sink][: REFERENCE_TOKENS - n].clone())
        n += len(kept[-1])
        if n == REFERENCE_TOKENS:
            break
    return torch.cat(kept)


def _own(verdicts: Iterable[Verdict]) -> list[Line]:
    """The challenger's own checks, as lines: those that fail, for a bound is a range."""
    return [
        Line(
            f"check {v.check.name}",
            float("nan"),
            v.value,
            v.bounds.high if v.value > v.bounds.high else v.bounds.low,
            False,
        )
        for v in verdicts
        if not v.passed and not v.check.warns
    ]


def _compare(
    settings: RetrainingSettings,
    old: Dictionary,
    new: Dictionary,
    samples: dict[str, Float[Tensor, "_ *site d_model"]],
    fates: Counter[str],
) -> Iterator[Line]:
    """Champion against challenger."""
    for whose, x in samples.items():
        of_old = measure(old, x.split(2048))
        of_new = measure(at_l0(new, x, of_old.l0), x.split(2048))
        bound = of_old.fvu * (1 + settings.fvu_worse_max)
        yield Line(f"FVU on {whose} held-out tokens, at equal L0", of_old.fvu, of_new.fvu, bound, of_new.fvu <= bound)
        bound = of_old.dead + settings.dead_worse_max
        yield Line(f"features silent on {whose} held-out tokens", of_old.dead, of_new.dead, bound, of_new.dead <= bound)
    kept = _kept_share(fates)
    yield Line("features kept", 1.0, kept, settings.kept_min, kept >= settings.kept_min)


def _fates(dictionary: Path) -> Counter[str]:
    """How many features met which fate in the last training."""
    path = dictionary / LINEAGE
    if not path.exists():
        return Counter()
    table = pq.read_table(path)
    newest = max(table["generation"].to_pylist(), default=0)
    return Counter(
        f for f, g in zip(table["fate"].to_pylist(), table["generation"].to_pylist(), strict=True) if g == newest
    )


def _kept_share(fates: Counter[str]) -> float:
    """Share of the old features that were found again, as they were; 1 when there were none."""
    before = sum(fates.values()) - fates["born"] - fates["split"]
    return fates["kept"] / before if before else 1.0


def _write_report(
    folder: Path, champion: Snapshot | None, parents: dict[str, Made], lines: list[Line], fates: Counter[str]
) -> None:
    """What changed, for people (`report.md`) and machines (`comparison.json`)."""
    slug = parents["dictionary"].manifest.slug
    said = {"dictionary": slug, "lines": [line._asdict() for line in lines], "fates": dict(fates)}
    text = [f"# Retraining of {slug}", "", _verdict(champion, lines), ""]
    if lines:
        text += ["| measure | served | challenger | bound | |", "| --- | --- | --- | --- | --- |"]
        text += [
            f"| {name} | {champion:.4g} | {challenger:.4g} | {bound:.4g} | {'passed' if passed else 'FAILED'} |"
            for name, champion, challenger, bound, passed in lines
        ]
    text += ["", "## Corpus", "", *_corpus_changes(champion, parents)]
    if fates:
        text += ["", "## Features", "", *(f"- {fate}: {n:,}" for fate, n in sorted(fates.items()))]
    for name, content in ((REPORT, "\n".join(text) + "\n"), (COMPARISON, json.dumps(said, indent=1))):
        with write_atomically(folder / name) as path:
            path.write_text(content, "utf-8")


def _verdict(champion: Snapshot | None, lines: list[Line]) -> str:
    if not all(line.passed for line in lines):
        return "**Refused**: what is served stays."
    return "**Promoted.**" if champion else "**First generation.**"


def _corpus_changes(champion: Snapshot | None, parents: dict[str, Made]) -> list[str]:
    """Counts of the corpus, before and now."""
    now = parents["corpus"].manifest
    before = champion.manifest("corpus", now.slug) if champion else None
    keys = ("documents", "tokens", "tokens_held_out")
    if before is None:
        return [f"- {key}: {now.summary[key]:,}" for key in keys]
    return [f"- {key}: {before.summary[key]:,} -> {now.summary[key]:,}" for key in keys]
