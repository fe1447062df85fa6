"""Labels that a retrained dictionary takes over from the one before: a feature that was kept keeps its name."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from sae_core.features import Example, Features
from sae_core.labels import prompts
from sae_core.labels.lexical import lexical_label
from sae_core.labels.reader import LabelRow, Labels


class Previous(NamedTuple):
    """The generation before."""

    labels: Path
    """Folder of its labels."""
    features: Path
    """Folder of its features."""
    kept: Mapping[int, int]
    """The features that were kept: number now, number then."""


def carry_over(previous: Previous, features: Features) -> list[LabelRow]:
    """The written labels of kept features that still fire, by the number now; not scored.

    A label that another version of the prompt asked for is left behind. What the label cost stays in its row.
    """
    labels, then = Labels.open(previous.labels), Features.open(previous.features)
    found = []
    for feature, old in sorted(previous.kept.items()):
        row, now = labels.label(old), features.feature(feature)
        if row.label and row.prompt_version == prompts.VERSION and not now.is_dead:
            examples = then.examples(old)
            seen = _seen([examples[i] for i in row.examples], features.examples(feature))
            row = replace(row, feature=feature, lexical=lexical_label(now), examples=seen)
            found.append(replace(row, scores=(), shuffled_from=None, beats_control=None))
    return found


def held_before(previous: Previous, rows: Collection[LabelRow]) -> set[int]:
    """Those of the carried features whose label was not known to be worse than its control."""
    labels = Labels.open(previous.labels)
    return {row.feature for row in rows if labels.label(previous.kept[row.feature]).beats_control is not False}


def _seen(shown: Collection[Example], examples: Collection[Example]) -> tuple[int, ...]:
    """Examples from documents that the writer saw: by number, as in the same corpus, or by the text in another one."""
    documents, texts = {example.document for example in shown}, {prompts.mark(example) for example in shown}
    return tuple(i for i, e in enumerate(examples) if e.document in documents or prompts.mark(e) in texts)
