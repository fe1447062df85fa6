"""Simulation: how strongly a feature of some name would fire on each token, as a language model expects it.

The model writes a digit for each token. The expected value over the digits that it might have written there is what it
says (Bills et al. 2023), so a server has to give log-probabilities. The score is Pearson's correlation with the
feature's values, over the tokens of all texts together.
"""

import math
import re

import numpy as np
from jaxtyping import Bool, Float, Num

from sae_core.labels.client import Completion
from sae_core.labels.prompts import BadAnswer
from sae_core.labels.scoring.items import SHOWN, Item
from sae_core.labels.scoring.metrics import RESAMPLES, Interval, between

STRONGEST = 9
ALTERNATIVES = 10
"""Tokens of which a log-probability is asked for at each place: the ten digits, if they are the likeliest."""
_LINE = re.compile(r"^\s*(\d+)\s*:\s*(\d)\s*$", re.MULTILINE)

Values = Float[np.ndarray, "texts shown"]


class NoProbabilities(BadAnswer):
    """The server gives no log-probabilities, and will give none to other questions either."""


def simulated(completion: Completion) -> Float[np.ndarray, " shown"]:
    """The expected value on each token shown; NaN where the answer says nothing of it.

    Raises:
        NoProbabilities: there are no log-probabilities.
        BadAnswer: no line of the answer is a token's number, a colon and a digit.
    """
    if completion.logprobs is None:
        raise NoProbabilities("the server gives no log-probabilities: a simulation cannot be scored")
    text, ends = "", []
    for token, _ in completion.logprobs:
        text += token
        ends.append(len(text))
    found = np.full(SHOWN, math.nan)
    for line in _LINE.finditer(text):
        if 1 <= (number := int(line[1])) <= SHOWN:
            at = int(np.searchsorted(ends, line.start(2), side="right"))
            found[number - 1] = _expected(completion.logprobs[at][1])
    if np.isnan(found).all():
        raise BadAnswer("there is no line with a token's number, a colon and a digit")
    return found


def _expected(candidates: dict[str, float]) -> float:
    """Mean of the digits among the candidates, each by its probability; NaN when there is none."""
    digits = {c: math.exp(p) for c, p in candidates.items() if re.fullmatch(r"[\s:]*\d\s*", c)}
    total = sum(digits.values())
    return sum(int(c.strip(" :\n\t")) * p for c, p in digits.items()) / total if total else math.nan


def values(items: list[Item]) -> Values:
    """What the feature does on the tokens shown; NaN where there is none."""
    found = np.full((len(items), SHOWN), math.nan)
    for row, item in zip(found, items, strict=True):
        acts = (item.acts or [0.0] * len(item.tokens))[item.shown]
        row[: len(acts)] = acts
    return found


def correlation(said: Values, true: Values, weights: Num[np.ndarray, "draws texts"] | None = None) -> np.ndarray:
    """Pearson's correlation over all tokens of which something is said, a text counting as often as its weight says.

    One value for each draw; without weights, one for all texts alike. 0 where either is the same on all tokens.
    """
    known = np.isfinite(said) & np.isfinite(true)
    x, y = np.where(known, said, 0.0), np.where(known, true, 0.0)
    sums = np.stack([v.sum(1) for v in (known, x, y, x * x, y * y, x * y)], 1)  # of each text
    n, sx, sy, sxx, syy, sxy = ((np.ones((1, len(said))) if weights is None else weights) @ sums).T
    spread = np.sqrt(np.clip(n * sxx - sx**2, 0, None) * np.clip(n * syy - sy**2, 0, None))
    return np.where(spread > 1e-9, (n * sxy - sx * sy) / np.where(spread > 1e-9, spread, 1), 0.0)


class Correlation:
    """The score of a simulation, as `metrics.Pairwise` is that of other questions; texts are drawn, not tokens."""

    def __init__(self, items: list[Item]) -> None:
        self._true = values(items)
        self._fires = np.array([item.fires for item in items])

    def mean(self, says: Values, kept: Bool[np.ndarray, " texts"]) -> float | None:
        """The correlation on the texts that are kept; None where nothing is said of any in which the feature fires."""
        if not np.isfinite(says[kept & self._fires]).any():
            return None
        return float(correlation(says[kept], self._true[kept])[0])

    def interval(self, says: Values, less: Values | None = None) -> Interval:
        """Of the correlation, or of how much it is above that of `less`."""
        if not all(np.isfinite(of).any() for of in (says, less) if of is not None):
            return Interval(math.nan, math.nan)
        n = len(says)
        draws = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), RESAMPLES)
        found = correlation(says, self._true, draws)
        return between(found if less is None else found - correlation(less, self._true, draws))
