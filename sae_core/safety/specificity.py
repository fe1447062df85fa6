"""What share of a feature's firings on the corpus is about a concept; patterns and sources stand in for a judge."""

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from sae_core.atlas import Atlas
from sae_core.display import shown_bytes
from sae_core.features import Features, Sample
from sae_core.safety.concepts import Concept, Where
from sae_core.safety.shapes import Specificity


class Judge(NamedTuple):
    """Says what in a corpus is about a concept.

    A document of a source that is about it from end to end is. Elsewhere a regular expression decides, which sees
    words and not meaning: it misses what is said otherwise, and is fooled by a word that stands beside.
    """

    about: str
    where: Where = "text"
    """What must match: a stretch of text, or a token of it."""
    documents: frozenset[int] = frozenset()
    """Those that are about it from end to end."""

    @classmethod
    def of(cls, concept: Concept, atlas: Atlas) -> "Judge":
        """The judge of a concept in an atlas's corpus."""
        return cls(concept.about, concept.where, frozenset(atlas.documents_of(concept.about_sources)))

    def at(self, document: int, tokens: Sequence[str], peak: int) -> bool:
        """Whether a firing on the token `peak` of a stretch of text is about the concept."""
        return document in self.documents or is_about(
            tokens if self.where == "text" else tokens[peak : peak + 1], self.about
        )

    def share(self, sample: Sample) -> float:
        """Share of a sample of the corpus that is about it: of its windows, or of their tokens."""
        found = [
            self.at(document, tokens, place)
            for document, tokens in zip(sample.documents, sample.tokens, strict=True)
            for place in (range(len(tokens)) if self.where == "token" else (0,))
        ]
        return sum(found) / max(len(found), 1)


def specificity(features: Features, feature: int, judge: Judge, corpus: float) -> Specificity:
    """The share of its firings that are about what the judge knows; `corpus`: the share of all text, `Judge.share`.

    Examples drawn at random from an activation level stand for the firings of that level.
    """
    examples = features.examples(feature)
    hits = {id(e): judge.at(e.document, e.tokens, e.peak) for e in examples}
    top = [hits[id(e)] for e in examples if e.kind == "top"]
    by_level: dict[int, list[bool]] = {}
    for example in examples:
        if example.kind == "level":
            by_level.setdefault(example.level, []).append(hits[id(example)])
    weights = _firings(features.feature(feature).histogram, max(by_level, default=1))
    total = sum(weights[level - 1] for level in by_level)
    hit = sum(weights[level - 1] * sum(found) / len(found) for level, found in by_level.items())
    share = hit / total if total else None
    return Specificity(share, sum(top) / len(top) if top else None, len(examples), corpus)


def is_about(tokens: Iterable[str], about: str) -> bool:
    """Whether the text of the tokens, as they are displayed, matches."""
    text = b"".join(map(shown_bytes, tokens)).decode("utf-8", "replace")
    return re.search(about, text, re.DOTALL) is not None


def _firings(histogram: list[int], levels: int) -> list[float]:
    """Firings in each of `levels` equal parts of the range that the histogram covers in finer ones."""
    found = [0.0] * levels
    for i, count in enumerate(histogram):
        found[min(levels - 1, i * levels // len(histogram))] += count
    return found
