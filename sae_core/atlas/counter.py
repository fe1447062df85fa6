"""Counter-examples: text in which what is said of a feature would mislead."""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

from sae_core.features import Example, Features
from sae_core.features.reader import FeatureRow
from sae_core.labels.meaning import Meaning, Rows, unit

_TELLING = 3  # top tokens whose silence is told


class Counter(NamedTuple):
    """Text against what is said of a feature."""

    by_label: bool
    """Against its label; else against the tokens that it fires on most."""
    silent: list[Example]
    """It should fire, and does not."""
    firing: list[Example]
    """It should not, and does."""


class CounterExamples:
    """Finds them in the sample of the corpus. Safe to use from several threads.

    Args:
        features: with their sample, if one is kept.
        meaning: of the features' names; without it, labels say nothing of texts.
    """

    def __init__(self, features: Features, meaning: Meaning | None) -> None:
        self._features, self._meaning = features, meaning

    def prepare(self) -> None:
        """Read the sample, which the first answer would else wait for."""
        if self._meaning:
            _ = self._windows

    def of(self, row: FeatureRow, examples: Sequence[Example], label: str, count: int) -> Counter:
        """At most `count` of either sort.

        With a written label: the texts most similar in meaning to it in which the feature does not fire, and the
        examples that are least similar to it. Without: texts with the tokens that it fires on most in which it does
        not fire, and its strongest examples on others than those.
        """
        told = self._meaning.vectors([label]) if self._meaning and label else None
        if told is None or not told.any():
            tokens = row.top_tokens[:_TELLING]
            others = [x for x in examples if x.tokens[x.peak] not in row.top_tokens]
            return Counter(False, self._features.silent(row.feature, tokens, count), others[:count])
        return Counter(True, self._silent(row.feature, told, count), self._firing(examples, told, count))

    def _silent(self, feature: int, told: Rows, count: int) -> list[Example]:
        fires = self._features.fires_in(feature)
        order = np.argsort(-(self._windows @ told[0]), kind="stable")[: count + len(fires)].tolist()
        found = []
        for window in [window for window in order if window not in fires][:count]:
            tokens = self._features.window(window)
            found.append(self._features.silent_in(feature, window, int((self._vectors(tokens) @ told[0]).argmax())))
        return found

    def _firing(self, examples: Sequence[Example], told: Rows, count: int) -> list[Example]:
        similar = self._vectors(["".join(x.tokens) for x in examples]) - self._middle
        return [examples[i] for i in np.argsort(unit(similar) @ told[0], kind="stable")[:count].tolist()]

    def _vectors(self, texts: Sequence[str]) -> Rows:
        assert self._meaning
        return self._meaning.vectors(texts)

    @cached_property
    def _texts(self) -> Rows:
        """What each text of the sample means."""
        return self._vectors(["".join(self._features.window(i)) for i in range(self._features.n_windows)])

    @cached_property
    def _middle(self) -> Rows:
        return self._texts.sum(0, keepdims=True) / np.float32(max(1, len(self._texts)))

    @cached_property
    def _windows(self) -> Rows:
        """The same seen from the middle of all: every text has the common words."""
        return unit(self._texts - self._middle)
