"""From a concept's rules to its prompts, split so that nothing that finds also tests.

Documents, not pieces, are dealt out to the splits; sentences with slots are split by sentence; generated texts by
their place in the seeded stream. The same rule gives the same prompts in every concept, so they are read once.
"""

import re
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import product, zip_longest
from typing import NamedTuple

import numpy as np

from sae_core.corpus.documents import Skipped, read_documents
from sae_core.made_texts import GENERATORS, Made
from sae_core.prompt_search import CLAIM_PROMPTS
from sae_core.safety.concepts import Concept, Rule, Sizes
from sae_core.study import Source

SPLITS = ("find", "calibrate", "test")
_LONGEST = 20_000
"""Characters of a document that are looked at."""


class Text(NamedTuple):
    """A prompt and its group: prompts of one group say nearly the same."""

    group: str
    text: str


Side = dict[str, list[Text]]
"""Prompts by split."""


class Drawn(NamedTuple):
    """A concept's prompts."""

    positive: Side
    negative: Side
    duplicates: int
    """Prompts left out because they occur in another split or on the other side too."""
    shifted: tuple[list[Text], list[Text]] | None
    """Positives and negatives of another origin."""

    @property
    def least(self) -> int:
        """Prompts on the smaller side of the smaller of find and test."""
        return min(len(side[split]) for side in (self.positive, self.negative) for split in ("find", "test"))

    @property
    def why_no_claim(self) -> str:
        """Why nothing can be claimed from these; empty when something can."""
        if self.least >= CLAIM_PROMPTS:
            return ""
        return f"{self.least} prompts on the smallest side, {CLAIM_PROMPTS} are needed"


def draw(concept: Concept) -> Drawn:
    """All prompts of a concept. Raises MindAtlasError when a source is not there or cannot be fetched."""
    seen: set[str] = set()
    positive, dropped = _side(concept.positive, concept.sizes, seen)
    negative, more = _side(concept.negative, concept.negatives or concept.sizes, seen)
    shifted = None
    if concept.shifted:
        sizes = Sizes(find=2, calibrate=0, test=concept.sizes.test)
        sides = [_side(rules, sizes, seen)[0] for rules in (concept.shifted.positive, concept.shifted.negative)]
        shifted = (sides[0]["test"], sides[1]["test"])
    return Drawn(positive, negative, dropped + more, shifted)


def _side(rules: Sequence[Rule], sizes: Sizes, seen: set[str]) -> tuple[Side, int]:
    """The rules' prompts, taken in turns until each split is full; those in `seen` are left out and counted."""
    given = [_of_rule(rule, sizes) for rule in rules]
    side: Side = {split: [] for split in SPLITS}
    dropped = 0
    for split in SPLITS:
        for text in (t for turn in zip_longest(*(g[split] for g in given)) for t in turn if t is not None):
            if len(side[split]) == getattr(sizes, split):
                break
            key = text.text.casefold() if not text.text.isupper() else text.text
            if key in seen:
                dropped += 1
                continue
            seen.add(key)
            side[split].append(text)
    return side, dropped


def _of_rule(rule: Rule, sizes: Sizes) -> Side:
    if rule.source:
        return _from_documents(rule, sizes)
    if rule.generator:
        return _generated(GENERATORS[rule.generator], sizes)
    return _written(rule, sizes)


def _from_documents(rule: Rule, sizes: Sizes) -> Side:
    """Pieces of documents; the documents are dealt out in a random order, in the proportions of the sizes."""
    documents = _documents(rule.source)
    having, without = (re.compile(pattern) if pattern else None for pattern in (rule.having, rule.without))
    wanted = {split: getattr(sizes, split) for split in SPLITS}
    total = sum(wanted.values())
    found: list[list[Text]] = []
    for number in np.random.default_rng(0).permutation(len(documents)).tolist():
        pieces = [p for p in _pieces(documents[number], rule, having) if not (without and without.search(p))]
        if pieces:
            group = f"{rule.source} {number}"
            found.append([Text(group, p.upper() if rule.upper else p) for p in pieces[: rule.pieces]])
        if len(found) >= 2 * total:  # enough, duplicates allowed for
            break
    shares = np.cumsum([wanted[split] / total for split in SPLITS])
    ends = [0, *np.round(shares * len(found)).astype(int).tolist()]
    return {split: [t for doc in found[ends[i] : ends[i + 1]] for t in doc] for i, split in enumerate(SPLITS)}


def _pieces(text: str, rule: Rule, having: re.Pattern[str] | None) -> Iterator[str]:
    """Stretches of about `characters`, whole words: from the start, or around the first match."""
    at = 0
    if having:
        match = having.search(text)
        if not match:
            return
        at = max(0, match.start() - rule.characters // 2)
    for start in range(at, max(at + 1, len(text)), rule.characters):
        piece = text[start : start + rule.characters]
        if start and not text[start - 1].isspace():
            piece = piece.partition(" ")[2] or piece
        if start + rule.characters < len(text) and not text[start + rule.characters].isspace():
            piece = piece.rpartition(" ")[0] or piece
        if len(piece.strip()) >= min(24, rule.characters) and (not having or having.search(piece)):
            yield piece.strip()


@cache
def _documents(source: str) -> tuple[str, ...]:
    return tuple(document.text for document in read_documents(Source(source=source), _LONGEST, Skipped()))


def _generated(maker: Callable[[np.random.Generator], Made], sizes: Sizes) -> Side:
    stream = maker(np.random.default_rng(0))
    return {split: [Text(*next(stream)) for _ in range(2 * getattr(sizes, split))] for split in SPLITS}


def _written(rule: Rule, sizes: Sizes) -> Side:
    """Prompts as they are; or sentences with all fillers, mixed. What calibrates is made from sentences that find."""
    if rule.prompts:
        lists = {"find": rule.prompts.find, "calibrate": [], "test": rule.prompts.test}
        return {split: [Text(text, text) for text in texts] for split, texts in lists.items()}
    assert rule.templates is not None
    find, test = (_filled(some, rule.fillers) for some in (rule.templates.find, rule.templates.test))
    return {"find": find[: sizes.find], "calibrate": find[sizes.find :], "test": test}


def _filled(templates: Sequence[str], fillers: dict[str, list[str]]) -> list[Text]:
    """Every template with every choice of its fillers, templates taking turns."""
    rng = np.random.default_rng(0)
    rows = []
    for template in templates:
        slots = list(dict.fromkeys(re.findall(r"\{(\w+)\}", template)))
        choices = list(product(*(fillers[slot] for slot in slots)))
        mixed = [choices[i] for i in rng.permutation(len(choices))]
        rows.append([Text(template, template.format(**dict(zip(slots, choice, strict=True)))) for choice in mixed])
    return [text for turn in zip_longest(*rows) for text in turn if text is not None]
