"""Several labelers of one dictionary: one is current, the others' tables are kept beside it, and two can be compared.

A labeler is a model with all that it was asked with. When labels of the same features are made again by another one,
the table that was current moves to `labelers/<name>.parquet` in the new artifact. To make an older one current again,
set `[labels]` back and run: its answers are in the cache, and cost nothing.
"""

import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from sae_core.artifacts import write_atomically
from sae_core.labels.reader import LABELERS, LABELS, LabelError, LabelRow, Labels, Score
from sae_core.settings import fingerprint

CURRENT = "current"


class Labeler(NamedTuple):
    """Who wrote labels, and what came of it."""

    name: str
    """`current`, or that of a file in `labelers/`."""
    model: str
    prompt_version: str
    seed: int
    written: int
    failed: int
    score: float | None
    """Mean over the features that have one; of detection where that was asked, else of fuzzing, else of embedding."""
    beats_control: float | None
    """Share of the compared labels that are better than another feature's."""
    dollars: float | None


class Compared(NamedTuple):
    """A feature that two labelers named."""

    feature: int
    one: str
    one_score: float | None
    other: str
    other_score: float | None
    one_beats_control: bool | None
    other_beats_control: bool | None


class Earlier(NamedTuple):
    """Labels of the same features that were made before."""

    folder: Path
    by: str
    """Name of the labeler that is current there."""
    now: str
    """Name of the one at work now, of which no earlier table is kept."""


def labeler_name(model: str, asked_with: Mapping[str, Any], prompt_version: str) -> str:
    """Of the model, with a fingerprint of all that it was asked with; safe as the name of a file."""
    safe = re.sub(r"[^\w.-]+", "-", model).strip(".-")[:60]
    return f"{safe}.{fingerprint([dict(asked_with), prompt_version])[:6]}"


def keep_earlier(earlier: Earlier, folder: Path) -> None:
    """Take the tables of all earlier labelers of the same features along, and the one that was current."""
    found = {path.stem: path for path in sorted((earlier.folder / LABELERS).glob("*.parquet"))}
    if any(row.status == "written" for row in Labels.open(earlier.folder).rows()):
        found[earlier.by] = earlier.folder / LABELS
    found.pop(earlier.now, None)
    for name, path in found.items():
        (folder / LABELERS).mkdir(exist_ok=True)
        with write_atomically(folder / LABELERS / f"{name}.parquet") as target:
            shutil.copyfile(path, target)


def labelers(folder: Path) -> list[Labeler]:
    """The labelers of the labels in `folder`, the current one first."""
    names = [CURRENT, *sorted(path.stem for path in (folder / LABELERS).glob("*.parquet"))]
    return [_labeler(name, open_labels(folder, name).rows()) for name in names]


def open_labels(folder: Path, name: str = CURRENT) -> Labels:
    """The labels of one labeler. Raises LabelError when there is none of that name."""
    if name == CURRENT:
        return Labels.open(folder)
    known = sorted(path.stem for path in (folder / LABELERS).glob("*.parquet"))
    if name not in known:
        raise LabelError(f"no labeler {name!r}: there are {', '.join([CURRENT, *known])}")
    return Labels(folder / LABELERS / f"{name}.parquet")


def compare(one: Sequence[LabelRow], other: Sequence[LabelRow]) -> list[Compared]:
    """The features that both named, in order."""
    return [
        Compared(a.feature, a.label, _value(best(a)), b.label, _value(best(b)), a.beats_control, b.beats_control)
        for a, b in zip(one, other, strict=True)
        if a.label and b.label
    ]


def best(row: LabelRow) -> Score | None:
    """The score that goes the furthest, as `reader.BEST_SCORE` has it; None where the label was not scored."""
    by = {score.scorer: score for score in row.scores}
    return next((by[name] for name in ("detection", "fuzzing", "embedding") if name in by), None)


def _value(score: Score | None) -> float | None:
    return score.score if score else None


def _labeler(name: str, rows: Sequence[LabelRow]) -> Labeler:
    written = [row for row in rows if row.status == "written"]
    first = written[0] if written else LabelRow(0)
    scores = [value for row in written if (value := _value(best(row))) is not None]
    beats = [row.beats_control for row in written if row.beats_control is not None]
    costs = [row.dollars for row in written]
    return Labeler(
        name, first.model, first.prompt_version, first.seed, len(written),
        sum(row.status == "failed" for row in rows), sum(scores) / len(scores) if scores else None,
        sum(beats) / len(beats) if beats else None, None if None in costs else sum(cost or 0.0 for cost in costs),
    )  # fmt: skip
