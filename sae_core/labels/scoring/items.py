"""The texts that a label is scored on, none of them from a document that its writer saw."""

import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float

from sae_core.features import Example
from sae_core.features.reader import Sample
from sae_core.labels.prompts import MARK_SHARE

T = TypeVar("T")

STRATA = ("random", "nearest", "neighbor")
"""Where texts come from in which the feature does not fire: drawn at random; most similar to those in which it does;
such in which a feature fires whose decoder row points a similar way."""

BEFORE, SHOWN = 13, 20
"""Tokens of a text that a judge is shown: so many in all, so many of them before the place it turns on. Whole windows
of 32 tokens took 1.5 times as many (see docs/labels.md)."""

Nearest = Callable[[Sequence[Example]], Iterable[int]]
"""Windows of the sample by similarity to examples, most similar first."""


class Scored(NamedTuple):
    """What came of scoring."""

    fields: dict[int, dict[str, Any]]
    """For each feature whose label was scored, the fields of its `LabelRow` that say so."""
    stopped: str
    """Why the judge asked no more, when the budget was used up."""


class Item(NamedTuple):
    """A text, and whether the feature fires in it."""

    tokens: list[str]
    marked: list[bool]
    """The tokens on which the feature fires; of a text in which it does not, as many others (see `negatives`)."""
    level: int = 0
    """Activation level of the strongest firing; 0: it does not fire."""
    stratum: str = ""
    """One of `STRATA`, of a text in which it does not fire."""
    place: int = 0
    """The token that the text turns on: the peak, of a neighbor where one fires; else a marked one."""
    acts: list[float] | None = None
    """The feature's value on each of the tokens; None: 0 on all."""

    @property
    def fires(self) -> bool:
        return self.level > 0

    @property
    def shown(self) -> slice:
        """The tokens that a judge is shown."""
        return shown(len(self.tokens), self.place)


class Names(NamedTuple):
    """What is scored on one feature's texts: its label, another feature's, and the lexical one."""

    own: str
    shuffled: str | None
    lexical: str

    def given(self) -> dict[str, str]:
        """Those that there are, by field."""
        return {kind: name for kind, name in self._asdict().items() if name}


class Trial(NamedTuple):
    """A feature's names, and the texts that they are tried on."""

    feature: int
    names: Names
    shuffled_from: int | None
    items: list[Item]


class Answers(NamedTuple):
    """What a scorer says of each text under each name: similarities, 1 and 0, ratings; NaN for no answer."""

    scorer: str
    says: dict[str, Float[np.ndarray, "texts ..."]]
    """By field of `Names`; of a simulation, of each token shown of each text."""
    prompt_tokens: int = 0
    completion_tokens: int = 0


def positives(examples: Sequence[Example], seen: set[int], count: int, seed: int) -> list[Example]:
    """At most `count` examples from other documents than those `seen`: one of each level, the highest first, again."""
    levels: dict[int, list[Example]] = {}
    for example in examples:
        if example.document not in seen:
            levels.setdefault(example.level, []).append(example)
    draw = random.Random(seed)
    for group in levels.values():
        draw.shuffle(group)
    return list(itertools.islice(_by_turns(levels[level] for level in sorted(levels, reverse=True)), count))


def negatives(
    sample: Sample, feature: int, neighbors: Sequence[int], chosen: Sequence[Example], seen: set[int], nearest: Nearest,
    seed: int,
) -> list[Item]:  # fmt: skip
    """As many texts in which the feature does not fire as `chosen` has, in equal parts of `STRATA` where there are.

    Where a neighbor fires, its tokens are marked; elsewhere one where some text of `chosen` has its peak, and others at
    random until they are as many as are shown marked in `chosen`, on average.

    Args:
        sample: windows, of which one knows what fires in them.
        feature: the feature.
        neighbors: features with similar decoder rows, nearest first; one window is taken of each before a second.
        chosen: the examples in which it fires.
        seen: documents that the label's writer saw.
        nearest: finds windows similar to examples.
        seed: of the draw.
    """
    draw = random.Random(seed)
    count = len(chosen)
    silent = sorted(set(range(len(sample.tokens))) - sample.acts(feature).keys())
    free = {window: None for window in draw.sample(silent, len(silent)) if sample.documents[window] not in seen}
    n_marked = math.ceil(sum(sum(item.marked[item.shown]) for item in map(as_item, chosen)) / count)
    found: list[Item] = []
    acts = {neighbor: sample.acts(neighbor) for neighbor in neighbors}
    for neighbor, window in _by_turns([(n, w) for w in free if w in acts[n]] for n in neighbors):
        if len(found) == count // 3:
            break
        if window in free:
            del free[window]
            its = acts[neighbor][window]
            found.append(Item(sample.tokens[window], marks(its), stratum="neighbor", place=its.index(max(its))))
    for stratum, order in (("nearest", nearest(chosen)), ("random", list(free))):
        wanted = len(found) + (count // 3 if stratum == "nearest" else count - len(found))
        for window in order:
            if len(found) == wanted:
                break
            if window in free:
                del free[window]
                found.append(_silent(sample.tokens[window], stratum, draw.choice(chosen).peak, n_marked, draw))
    return found


def _silent(tokens: list[str], stratum: str, peak: int, n_marked: int, draw: random.Random) -> Item:
    """A text in which nothing that matters fires, marked as if something did."""
    place = min(peak, len(tokens) - 1)
    others = [i for i in range(len(tokens))[shown(len(tokens), place)] if i != place]
    marked = {place, *draw.sample(others, min(n_marked - 1, len(others)))}
    return Item(tokens, [i in marked for i in range(len(tokens))], stratum=stratum, place=place)


def shown(n_tokens: int, place: int) -> slice:
    """The `SHOWN` tokens around a place; all texts that are longer have as many, so that length tells nothing."""
    first = min(max(place - BEFORE, 0), max(n_tokens - SHOWN, 0))
    return slice(first, first + SHOWN)


def marks(acts: Sequence[float]) -> list[bool]:
    """The tokens that are marked: those with at least `MARK_SHARE` of the strongest activation in the text."""
    least = MARK_SHARE * max(acts, default=0.0)
    return [act > 0 and act >= least for act in acts]


def as_item(example: Example) -> Item:
    """An example as a text to judge."""
    return Item(example.tokens, marks(example.acts), example.level, place=example.peak, acts=example.acts)


def _by_turns(groups: Iterable[Iterable[T]]) -> Iterator[T]:
    """The first of each group, then the second of each, and so on."""
    nothing = object()
    for turn in itertools.zip_longest(*groups, fillvalue=nothing):
        yield from (value for value in turn if value is not nothing)  # type: ignore[misc]
