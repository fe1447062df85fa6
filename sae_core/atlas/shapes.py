"""What an atlas answers with."""

from dataclasses import dataclass
from typing import Any

from sae_core.features import Example, FeatureRow
from sae_core.settings import DOCUMENTED


@dataclass(frozen=True, slots=True)
class Hit:
    """A feature that a search found."""

    __pydantic_config__ = DOCUMENTED

    feature: int
    label: str
    score: float
    """Higher is better; comparable within one search only."""
    why: str
    """Where it was found, with the text around; empty when nothing was searched."""
    density: float
    max_act: float = 0.0
    kind: str = ""
    """The label's kind; empty where no label was written."""
    label_score: float | None = None
    cluster: int | None = None
    beats_control: bool | None = None
    """Whether the label did better than another feature's on text that its writer did not see; None: not scored."""
    meaning: float | None = None
    """Cosine of the query with its name, of one that was found by meaning, see `labels.meaning`."""


@dataclass(frozen=True, slots=True)
class Neighbor:
    """A feature whose decoder row points a similar way."""

    feature: int
    label: str
    cosine: float
    beats_control: bool | None = None
    """Whether the label did better than another feature's, see `LabelRow`; None: not scored."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a feature lies on the map; cluster -1 is none."""

    x: float
    y: float
    cluster: int


@dataclass(frozen=True, slots=True)
class Ancestor:
    """What a feature was before a retraining."""

    __pydantic_config__ = DOCUMENTED

    generation: int
    """The generation that the retraining made."""
    fate: str
    """`kept`: the same; `moved`: the same, much changed; `split`: a second one like an old one; `merged`: an old one
    that went up in it; `born`: like none before."""
    previous: int | None
    """Its number in the generation before."""
    cosine: float
    """Of the decoder rows before and after."""
    correlation: float
    """Of the activations before and after, on the same tokens."""


@dataclass(frozen=True, slots=True)
class FeatureCard:
    """One feature with everything about it. What a stage that is not made yet would tell is None or empty."""

    row: FeatureRow
    name: str
    """The label; the lexical one where no label was written."""
    label: dict[str, Any] | None
    """Its row of `labels.parquet`."""
    examples: list[Example]
    neighbors: list[Neighbor]
    place: Place | None
    steering: dict[str, Any] | None
    """Its row of `scores.parquet`: how well it steers."""
    history: list[Ancestor]
    """Newest first; empty where the dictionary was never trained again."""


@dataclass(frozen=True, slots=True)
class Fired:
    """A feature that fires on a token."""

    __pydantic_config__ = DOCUMENTED

    feature: int
    value: float
    """Its activation."""
    label: str
    beats_control: bool | None = None
    """Whether the label did better than another feature's, see `LabelRow`; None: not scored."""


@dataclass(frozen=True, slots=True)
class ExplainedToken:
    """A token of a text, and the features that fire on it most strongly."""

    __pydantic_config__ = DOCUMENTED

    token: str
    features: list[Fired]
    value: float | None = None
    """What the feature that was asked for does here; None when none was."""
