"""The findings of a site, written: a table for people, all numbers for programs, and the families as a tree."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from sae_core.artifacts import SCRATCH
from sae_core.progress import Report, silent
from sae_core.science.claims import Claim, claims
from sae_core.science.findings import Bases, Findings, Given, Measuring
from sae_core.study import ScienceSettings

REPORT, MARKDOWN, TREE = "science.json", "science.md", "tree.txt"


def build_science(
    settings: ScienceSettings, given: Given, folder: Path, device: str = "cpu", report: Report = silent
) -> dict[str, Any]:
    """Measure all claims on the sweep's dictionaries, and write `science.json`, `science.md` and `tree.txt`.

    Args:
        settings: how much of the text, and what is looked at.
        given: the site, and what was made of it.
        folder: where to write.
        device: where models run and dictionaries are trained.
        report: told of its steps.

    Returns:
        How many claims hold, do not, and cannot be told; and the main numbers.

    Raises:
        ModelError: the model cannot be loaded, or has no neurons.
        TrainingError: too few activations.
    """
    found = Measuring(settings, given, folder / SCRATCH, device, report).findings()
    rows = list(claims(found))
    (folder / REPORT).write_text(json.dumps(_as_json(rows, found)), "utf-8")
    (folder / TREE).write_text("\n".join(found.family) + "\n", "utf-8")
    (folder / MARKDOWN).write_text(markdown(rows, found), "utf-8")
    return {verdict: sum(row.verdict == verdict for row in rows) for verdict in ("holds", "does not")} | {
        "cannot_tell": sum(row.verdict.startswith("cannot") for row in rows), "claims": len(rows),
        "twins_shared": found.universality.shared, "concepts": len(found.concepts),
    }  # fmt: skip


def _as_json(rows: Sequence[Claim], found: Findings) -> dict[str, Any]:
    """All that was found; `tree` has each feature of a larger dictionary and its parent, if it lies under one."""
    bases, control = found.bases, found.control
    return {
        "claims": [row._asdict() for row in rows],
        "universality": found.universality._asdict(),
        "by_architecture": [one._asdict() | {"same": one.same._asdict()} for one in found.by_architecture],
        "covered": [one._asdict() | {"fit": one.fit._asdict() | {"half": one.fit.half}} for one in found.covered],
        "bases": bases and [
            {"name": one.name, "live": one.live, "dense": one.dense, "single_token": one.single_token,
             "scores": one.scores().tolist()} for one in bases.readings
        ],
        "alike": bases and [{"neuron": a.neuron.tolist(), "coordinate": a.coordinate.tolist()} for a in bases.alike],
        "control": control and {
            name: {"single_token": one.single_token, "scores": one.scores().tolist()}
            for name, one in (("trained", control.trained), ("shuffled", control.shuffled))
        },
        "letters": [one._asdict() for one in found.letters.found],
        "proxies": [[one._asdict() for one in pair] for pair in found.proxies],
        "formal": [{"kind": one.kind.name, "tokens": one.tokens,
                    "features": one.features and one.features._asdict()} for one in found.formal],
        "rated": found.rated and {"judge": found.rated.judge, "levels": found.rated.levels.tolist()},
        "concepts": [(concept.kind, concept.name, len(concept.rows)) for concept in found.concepts],
        "tokens": found.tokens,
        "tree": [row for level in found.kin for row in level.rows()],
    }  # fmt: skip


def markdown(rows: Sequence[Claim], found: Findings) -> str:
    """The table; bases, concepts and families."""
    lines = ["| claim | the paper | ours | control | 95% interval | verdict |", "|---|---|---|---|---|---|"]
    lines += [_row(row) for row in rows]
    if found.bases:
        lines += ["", *_bases(found.bases)]
    by_kind: Mapping[str, list[int]] = {}
    for number, concept in enumerate(found.concepts):
        by_kind = {**by_kind, concept.kind: [*by_kind.get(concept.kind, []), number]}
    lines += ["", "Concepts that have a feature, by kind:", "", _row(["", *by_kind])]
    lines += ["|---|" + "---|" * len(by_kind)]
    for one in found.covered:
        lines.append(
            _row([one.name, *(f"{sum(one.has[i] for i in kind)} of {len(kind)}" for kind in by_kind.values())])
        )
    lines += ["", "The largest families: d_sae/feature, and the tokens among its 20 strongest.", "", "```"]
    return "\n".join([*lines, *found.family[:40], "```"]) + "\n"


def _bases(bases: Bases) -> Iterator[str]:
    """Features beside neurons: how they fire, and on what."""
    yield f"Features and neurons of the same layer, on {bases.tokens:,} tokens, as many firing on a token:\n"
    yield _row(["", "live", "on more than 1%", "judged", "one token", "balanced accuracy of three tokens: quartiles"])
    yield "|---|---|---|---|---|---|"
    for one in bases.readings:
        quartiles = np.quantile(one.scores(), [0.25, 0.5, 0.75]) if len(one.scores()) else []
        yield _row([
            one.name, f"{one.live:,}", f"{one.dense:.0%}", f"{len(one.single):,}", f"{one.single_token:.0%}",
            ", ".join(f"{q:.2f}" for q in quartiles),
        ])  # fmt: skip
    yield "\nSome of each, drawn at random, by the tokens among their 20 strongest:\n\n```"
    for one, tokens in zip(bases.readings, bases.shown, strict=True):
        yield f"{one.name}: {' | '.join(tokens)}"
    yield "```"


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cell.replace('|', '&#124;') for cell in cells)} |"
