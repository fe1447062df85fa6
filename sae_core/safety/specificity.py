"""What share of a feature's firings on the corpus is about a concept; a pattern of words stands in for a judge."""

import re
from collections.abc import Sequence

from sae_core.display import shown_bytes
from sae_core.features import Features
from sae_core.safety.concepts import Where
from sae_core.safety.shapes import Specificity


def specificity(features: Features, feature: int, about: str, corpus: float, where: Where = "text") -> Specificity:
    """The share of firings that match the regular expression `about`: they, or their surroundings in the example.

    Examples drawn at random from an activation level stand for the firings of that level. A pattern sees words and not
    meaning: it misses what is said otherwise, and is fooled by a word that stands beside. `corpus`: `share_of_corpus`.
    """
    examples = features.examples(feature)
    hits = {id(e): is_about(e.tokens if where == "text" else e.tokens[e.peak : e.peak + 1], about) for e in examples}
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


def share_of_corpus(windows: Sequence[Sequence[str]], about: str, where: Where = "text") -> float:
    """Share of a sample of the corpus (each window its tokens) that matches: of the windows, or of their tokens."""
    texts = windows if where == "text" else [[token] for tokens in windows for token in tokens]
    return sum(is_about(tokens, about) for tokens in texts) / max(len(texts), 1)


def is_about(tokens: Sequence[str], about: str) -> bool:
    """Whether the text of the tokens, as they are displayed, matches."""
    text = b"".join(map(shown_bytes, tokens)).decode("utf-8", "replace")
    return re.search(about, text, re.DOTALL) is not None


def _firings(histogram: list[int], levels: int) -> list[float]:
    """Firings in each of `levels` equal parts of the range that the histogram covers in finer ones."""
    found = [0.0] * levels
    for i, count in enumerate(histogram):
        found[min(levels - 1, i * levels // len(histogram))] += count
    return found
