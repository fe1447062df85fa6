"""What share of a feature's firings on the corpus is about a concept; a pattern of words stands in for a judge."""

import re
from typing import NamedTuple

from sae_core.features import Features


class Specificity(NamedTuple):
    """Of the kept examples, weighted by how often the feature fires at each level."""

    share: float | None
    """None for a feature without examples."""
    top: float | None
    """Share of its strongest examples."""
    examples: int


def specificity(features: Features, feature: int, about: str) -> Specificity:
    """The share of firings whose surroundings (the example's tokens) match the regular expression `about`.

    Examples drawn at random from an activation level stand for the firings of that level. A pattern sees words and not
    meaning: it misses what is said otherwise, and is fooled by a word that stands beside.
    """
    pattern = re.compile(about, re.DOTALL)
    examples = features.examples(feature)
    hits = {id(e): bool(pattern.search("".join(e.tokens))) for e in examples}
    top = [hits[id(e)] for e in examples if e.kind == "top"]
    by_level: dict[int, list[bool]] = {}
    for example in examples:
        if example.kind == "level":
            by_level.setdefault(example.level, []).append(hits[id(example)])
    weights = _firings(features.feature(feature).histogram, max(by_level, default=1))
    total = sum(weights[level - 1] for level in by_level)
    hit = sum(weights[level - 1] * sum(found) / len(found) for level, found in by_level.items())
    return Specificity(hit / total if total else None, sum(top) / len(top) if top else None, len(examples))


def _firings(histogram: list[int], levels: int) -> list[float]:
    """Firings in each of `levels` equal parts of the range that the histogram covers in finer ones."""
    found = [0.0] * levels
    for i, count in enumerate(histogram):
        found[min(levels - 1, i * levels // len(histogram))] += count
    return found
