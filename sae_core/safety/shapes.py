"""What the audit and the monitor answer with; light, as the server shows these, too."""

from dataclasses import dataclass

from sae_core.settings import DOCUMENTED

RIGHT = 0.5
"""A feature counts as the concept's own when at least this share of its firings on the corpus is about it,"""
LIFT = 2.0
"""and this many times the share of the corpus that is."""


@dataclass(frozen=True, slots=True, order=True)
class Alert:
    """A run of tokens on which a concept's feature is at its threshold or above."""

    __pydantic_config__ = DOCUMENTED

    text: int
    """Which text, counted from 0."""
    concept: str
    feature: int
    label: str
    start: int
    """First token of the run."""
    stop: int
    """First token behind it."""
    value: float
    """The largest activation in the run."""
    probability: float
    """Chance that a text with this value is about the concept, at the base rate."""
    threshold: float


@dataclass(frozen=True, slots=True)
class Rated:
    """An AUC on prompts that played no part in finding, and its bootstrap interval."""

    auc: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Random:
    """AUCs of features taken at random among those that fire."""

    __pydantic_config__ = DOCUMENTED

    mean: float
    high: float
    """The AUC that 5% of them exceed."""


@dataclass(frozen=True, slots=True)
class Specificity:
    """What a feature's firings on the corpus are about, by sources and a pattern of words.

    Shares are of its kept examples, weighted by how often it fires at each level.
    """

    __pydantic_config__ = DOCUMENTED

    share: float | None
    """Share of its firings that are about the concept; null without examples."""
    top: float | None
    """Share of its strongest examples."""
    examples: int
    corpus: float
    """Share of a sample of the corpus, in stretches as long or in tokens, that is about the concept."""

    @property
    def is_own(self) -> bool:
        """Whether it is the concept's own feature, as far as the judge can tell."""
        return self.share is not None and self.share >= max(RIGHT, LIFT * self.corpus)


@dataclass(frozen=True, slots=True)
class Steers:
    """What turning a feature up does to the model's next words (see `steering_scores`)."""

    __pydantic_config__ = DOCUMENTED

    output_score: float | None
    role: str | None
    """`output`: it makes the model say what it promotes, more than random directions do; `input`: it does not."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A monitor's threshold, set on some texts and measured on others."""

    __pydantic_config__ = DOCUMENTED

    asked: float
    """The rate of false alarms that it was set for."""
    false_positives: int
    negatives: int
    low: float
    high: float
    """Interval of the rate of false alarms (Clopper and Pearson 1934)."""
    true_positives: int
    positives: int

    @property
    def rate(self) -> float:
        """Of false alarms."""
        return self.false_positives / self.negatives

    @property
    def off(self) -> float:
        """The factor by which the rate is above or below the one asked for; no alarm counts as half of one."""
        rate = max(self.false_positives, 0.5) / self.negatives
        return max(rate / self.asked, self.asked / rate)


@dataclass(frozen=True, slots=True)
class Effect:
    """What a change does to a behavior."""

    __pydantic_config__ = DOCUMENTED

    behavior: str
    feature: int | None
    """None for the model as it is, and for words."""
    change: str
    """`none`, `down`, `ablated`, `up` or `asked`."""
    by: str
    """What was changed: `nothing`, `feature`, `random_direction`, `random_feature` or `words`."""
    odds: float
    """Mean log-odds of `one`, nats."""
    shift: float
    """Their difference to the model as it is, mean over items (and over random draws)."""
    low: float
    high: float
    """95% bootstrap interval of the shift, over items and draws."""
    rate: float
    """Share of items in which `one` is the likelier."""
    said: float
    """Change of the ln of the probability that it says either, nats: far below 0, the model is merely broken."""
    draws: int
    as_large: int | None
    """Of a feature: how many of the random draws shift the odds at least as far, in either direction."""
