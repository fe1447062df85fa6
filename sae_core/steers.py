"""What can be done to features, in words: without torch, for what only passes it on (`steering.py` does it)."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, get_args

import numpy as np
from jaxtyping import Float

from sae_core.errors import MindAtlasError

if TYPE_CHECKING:
    from sae_core.atlas import Atlas

Method = Literal["clamp", "add", "scale", "min_clamp"]
Scope = Literal["all", "generated", "last_turn", "no_special"]
"""Positions that are steered: all; those of generated tokens only, so that the first is drawn as always; all from what
the last user turn says; all but those of the tokenizer's special tokens. Attention sinks never are."""

ABSURD = 20.0
"""Above this many maxima, texts of any model seen so far repeat one token (Templeton et al. 2024 went to 10, and to 20
for one feature)."""


class SteeringError(MindAtlasError):
    """A feature or a strength that one cannot steer with."""


class Steer(NamedTuple):
    """What is done to a feature whose activation is f and whose maximum over the corpus is m.

    | method      | f becomes           | strength                                |
    | ----------- | ------------------- | --------------------------------------- |
    | `clamp`     | strength * m        | 0 takes it away, less than 0 opposes it |
    | `add`       | f + strength * m    | 0 leaves it                             |
    | `scale`     | strength * f        | 0 takes it away, 1 leaves it, 2 doubles |
    | `min_clamp` | max(f, strength * m)| not negative                            |
    """

    feature: int
    strength: float
    method: Method = "clamp"


def cautions(atlas: "Atlas", steers: Sequence[Steer]) -> list[str]:
    """What a person should know of strengths that are allowed and will hardly do good."""
    found = []
    for feature, strength, method in steers:
        suggested = atlas.suggested_strength(feature)
        if abs(strength) > ABSURD:
            found.append(f"feature {feature}: at {strength:g} times its maximum the text will be degenerate")
        elif method == "clamp" and suggested is not None and strength > suggested:
            found.append(f"feature {feature}: above its suggested strength of {suggested:g} the text may be degenerate")
    return found


def check_steers(
    steers: Sequence[Steer], max_acts: Float[np.ndarray, " d_sae"], scope: Scope = "all", *, repeats: bool = False
) -> None:
    """Refuse what makes no sense, as `Steering` does; `repeats` lets a feature be named twice. Raises SteeringError."""
    if scope not in get_args(Scope):
        raise SteeringError(f"scope {scope!r} is none: give one of {', '.join(get_args(Scope))}")
    for feature, strength, method in steers:
        if not 0 <= feature < len(max_acts):
            raise SteeringError(f"feature {feature} does not exist: the dictionary has 0 to {len(max_acts) - 1}")
        if method not in get_args(Method):
            raise SteeringError(f"method {method!r} is none: give one of {', '.join(get_args(Method))}")
        if not math.isfinite(strength):
            raise SteeringError(f"feature {feature}: strength {strength} is no number: try 5, 10 or -2")
        if not max_acts[feature] > 0:
            raise SteeringError(
                f"feature {feature} is dead: it never fires on the corpus, so it has no strength: choose another"
            )
        if method == "min_clamp" and strength < 0:
            raise SteeringError(
                f"feature {feature}: min_clamp at {strength:g} changes nothing: give 0 or more, or clamp"
            )
    if not repeats and len({steer.feature for steer in steers}) < len(steers):
        raise SteeringError("a feature is steered twice: give each feature one strength")


def parse_steers(text: str) -> tuple[Steer, ...]:
    """`1234:10, 99:-2:add` as a list: feature, strength and, when it is not clamp, method. Raises SteeringError."""
    found = []
    for part in text.split(","):
        feature, _, rest = part.strip().partition(":")
        strength, _, method = rest.partition(":")
        try:
            found.append(Steer(int(feature), float(strength), method or "clamp"))  # type: ignore[arg-type]
        except ValueError:
            raise SteeringError(f"{part.strip()!r}: write FEATURE:STRENGTH or FEATURE:STRENGTH:METHOD") from None
    return tuple(found)
