"""Why this token and not that one, as the command line, the API and the page tell it: attributions with labels.

Light to import: torch is needed only when something is asked.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sae_core.atlas import Atlas
from sae_core.settings import DOCUMENTED
from sae_core.steers import SteeringError

if TYPE_CHECKING:
    from sae_core.circuits.attribution import Attribution, Change, Choice, Trace
    from sae_core.prompt_reader import PromptReader


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked of the model."""

    prompt: str
    target: str = ""
    """Its first token is the one that is asked about; empty: the likeliest."""
    against: str = ""
    """Its first token is the one that it is held against; empty: the likeliest other."""
    compare: str = ""
    """A second prompt, about the same two tokens; empty: none."""
    limit: int = 10
    """Features at tokens that are told, and ablated."""
    steps: int = 0
    """Of integrated gradients; 0: the gradient alone."""


@dataclass(frozen=True, slots=True)
class Token:
    """A token of the prompt."""

    __pydantic_config__ = DOCUMENTED

    token: str
    is_sink: bool
    """An attention sink: it has no features, and stays as it is."""
    features: float
    """Attribution of all its features together, in logits."""
    error: float
    """Attribution of what the dictionary misses there."""


@dataclass(frozen=True, slots=True)
class Compared:
    """One of the two tokens."""

    __pydantic_config__ = DOCUMENTED

    token: str
    logit: float
    probability: float


@dataclass(frozen=True, slots=True)
class Cause:
    """A feature at a token."""

    __pydantic_config__ = DOCUMENTED

    position: int
    token: str
    feature: int
    label: str
    beats_control: bool | None
    """Whether its label did better than another feature's; null: not scored."""
    act: float
    """Its activation there."""
    share: float | None
    """That as a share of its maximum over the corpus; null where it never fired."""
    attribution: float
    """In logits, to first order; above 0 it speaks for the target."""
    ablation: float
    """By how much the difference of logits really falls without it."""


@dataclass(frozen=True, slots=True)
class Why:
    """What a prompt's next token owes to the features of the site.

    difference = base + of_features + of_error + rest, exactly.
    """

    __pydantic_config__ = DOCUMENTED

    prompt: str
    tokens: list[Token]
    target: Compared
    against: Compared
    difference: float
    """Logit of the target less that of the other."""
    base: float
    """The same where the site holds only the decoder's bias, and the sinks: what does not come from this site."""
    of_features: float
    of_error: float
    """What the dictionary misses: no feature stands for it."""
    rest: float
    """What the first order misses."""
    steps: int
    n_active: int
    """Features at tokens that fire: all of them are in `of_features`."""
    causes: list[Cause]
    """Those of the largest attributions, of either sign, the largest first."""
    notes: list[str]


@dataclass(frozen=True, slots=True)
class SharedFeature:
    """A feature in both prompts, all tokens together."""

    __pydantic_config__ = DOCUMENTED

    feature: int
    label: str
    beats_control: bool | None
    left: float
    """Its attribution in the first prompt."""
    right: float
    """In the second."""
    stays: bool
    """It speaks for the same side in both, in neither less than half as loud as in the other."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What was asked."""

    __pydantic_config__ = DOCUMENTED

    why: Why
    compared: Why | None
    """Of the second prompt; null where there is none."""
    features: list[SharedFeature]
    """Those that matter most in either prompt; empty where there is but one."""


@dataclass(frozen=True, slots=True)
class Held:
    """A feature held at a strength."""

    feature: int
    strength: float = 0.0
    """In maxima of the feature over the corpus; 0 takes it away."""
    position: int | None = None
    """At this token; null: at all."""


@dataclass(frozen=True, slots=True)
class NextToken:
    """A token that may follow."""

    __pydantic_config__ = DOCUMENTED

    token: str
    before: float
    """Its probability in the model as it is."""
    after: float
    """With the features held."""


@dataclass(frozen=True, slots=True)
class Next:
    """What follows, as the model is and with features held."""

    __pydantic_config__ = DOCUMENTED

    tokens: list[NextToken]
    """The likeliest of both, by their probability after."""
    before: float
    """Logit of the target less that of the other, in the model as it is."""
    after: float


def answer(atlas: Atlas, reader: "PromptReader", asked: Question) -> Answer:
    """Attribute, and ablate the features of the largest attributions.

    Raises AttributionError, PromptError or ModelError as `attribution.Trace` and `Trace.attribute`.
    """
    from sae_core.circuits.attribution import Trace, compared

    trace = Trace(reader, asked.prompt)
    found = trace.attribute(asked.target, asked.against, asked.steps)
    one = _told(atlas, trace, found, asked.prompt, asked.limit)
    if not asked.compare:
        return Answer(one, None, [])
    trace = Trace(reader, asked.compare)
    other = trace.attribute(found.target.id, found.against.id, asked.steps)
    rows = [
        SharedFeature(row.feature, atlas.name(row.feature), atlas.beats_control(row.feature), row.left, row.right,
                      row.stays)
        for row in compared(found, other, asked.limit)
    ]  # fmt: skip
    return Answer(one, _told(atlas, trace, other, asked.compare, asked.limit), rows)


def follows(
    atlas: Atlas, reader: "PromptReader", asked: Question, held: Sequence[Held], limit: int = 10
) -> Next:  # fmt: skip
    """The next token with features held, together and in no order, at some tokens of the first prompt.

    Raises as `answer`; SteeringError, when a feature that never fires is to be held at a part of its maximum.
    """
    from sae_core.circuits.attribution import Trace

    trace = Trace(reader, asked.prompt)
    changes = [_change(atlas, one) for one in held]
    target, other = trace.choose(asked.target, asked.against)
    after = trace.changed(changes)
    told = dict.fromkeys([*trace.likeliest(after, limit).tolist(), *trace.likeliest(trace.clean, limit).tolist()])
    was, now = trace.clean.softmax(0), after.softmax(0)
    strings = trace.lm.token_strings([*told])
    tokens = [NextToken(string, float(was[i]), float(now[i])) for i, string in zip(told, strings, strict=True)]
    before = float(trace.clean[target] - trace.clean[other])
    return Next(sorted(tokens, key=lambda t: -t.after), before, float(after[target] - after[other]))


def _change(atlas: Atlas, held: Held) -> "Change":
    from sae_core.circuits.attribution import Change

    maximum = atlas.features.feature(held.feature).max_act
    if held.strength and not maximum > 0:
        raise SteeringError(
            f"feature {held.feature} is dead: it never fires on the corpus, so it has no strength: choose another"
        )
    return Change(held.feature, held.strength * maximum, held.position)


def _told(atlas: Atlas, trace: "Trace", found: "Attribution", prompt: str, limit: int) -> Why:
    places = found.top(limit)
    nodes = [found.node(place) for place in places.tolist()]
    causes = []
    for node, effect in zip(nodes, trace.ablated(found, places).tolist(), strict=True):
        maximum = atlas.features.feature(node.feature).max_act
        causes.append(
            Cause(
                node.position, found.tokens[node.position], node.feature, atlas.name(node.feature),
                atlas.beats_control(node.feature), node.act, node.act / maximum if maximum > 0 else None,
                node.attribution, effect,
            )
        )  # fmt: skip
    columns = found.is_sink.tolist(), found.heat.tolist(), found.errors.tolist()
    return Why(
        prompt=prompt,
        tokens=[Token(*row) for row in zip(found.tokens, *columns, strict=True)],
        target=_shown(found.target),
        against=_shown(found.against),
        difference=found.difference,
        base=found.base,
        of_features=found.of_features,
        of_error=found.of_error,
        rest=found.rest,
        steps=found.steps,
        n_active=len(found.values),
        causes=causes,
        notes=found.notes,
    )


def _shown(choice: "Choice") -> Compared:
    return Compared(choice.token, choice.logit, choice.probability)
