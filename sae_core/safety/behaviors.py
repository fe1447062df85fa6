"""Behaviors with and without a feature, against the controls of the steering report.

A behavior is a choice between two ways to go on: to give up a right answer or to keep it, to praise a bad poem or to
criticize it, `she` or `he` after a profession. It is measured as log-odds, ln P(one) - ln P(other), each summed over
its ways of saying it; nothing is sampled, so that a small effect is not lost in the luck of drawing. The features are
those that the audit found for the behavior's concept, turned down, taken away and turned up.

Each change is held against the same change along random directions of equal norm, against random other features at the
same strength, and against words that ask for the opposite.
"""

import hashlib
import itertools
import json
import tomllib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float
from pydantic import Field

from sae_core.errors import MindAtlasError
from sae_core.language_model import LanguageModel, Message
from sae_core.names import Site
from sae_core.progress import Report, silent
from sae_core.safety.audit import AUDIT
from sae_core.safety.shapes import Effect
from sae_core.settings import Settings
from sae_core.steering import Steer
from sae_core.steering_replay import Passage, Replay
from sae_core.steering_texts import Condition, Subject, condition_steering, with_controls
from sae_core.study import BehaviorSettings

SHIPPED = Path(__file__).with_suffix(".toml")
BEHAVIORS, TABLE, MARKDOWN = "behaviors.json", "behaviors.parquet", "behaviors.md"
CHANGES = {"down": -1.0, "ablated": 0.0, "up": 1.0}
"""Clamps, in shares of the strength that the settings ask for."""
_TOKENS = 2**13
"""Tokens read at once."""
_RESAMPLES = 2000


class BehaviorError(MindAtlasError):
    """A behavior that cannot be measured."""


class Behavior(Settings):
    """A choice between two ways to go on. `{slots}` are filled from each item."""

    name: str
    description: str
    concept: str
    """Of the audit, whose features are steered."""
    instruction: str
    """Words that ask for the opposite: the prompt-only control."""
    text: str = ""
    """Plain text that goes on; or, in its place,"""
    turns: list[dict[str, str]] = Field(default=[])
    """a conversation that is answered,"""
    begins: str = ""
    """with an answer that begins so."""
    before: list[dict[str, str]] = Field(default=[])
    """A conversation in which the model must prefer `other`, or the item does not count: it did not know."""
    one: list[str] = Field(min_length=1)
    one_means: str
    other: list[str] = Field(min_length=1)
    other_means: str
    items: list[dict[str, str]] = Field(min_length=2)

    @property
    def identity(self) -> str:
        """SHA-256 of all of it."""
        return hashlib.sha256(self.model_dump_json().encode()).hexdigest()


class Choice(NamedTuple):
    """An item, as tokens."""

    prompt: list[int]
    one: list[list[int]]
    other: list[list[int]]


class Chosen(NamedTuple):
    """What a model does with some choices, under some conditions."""

    odds: Float[np.ndarray, "conditions choices"]
    """ln P(one) - ln P(other)."""
    said: Float[np.ndarray, "conditions choices"]
    """ln of the probability that it is one of both."""

    def split(self, lengths: Sequence[int]) -> Iterator["Chosen"]:
        """So many conditions each."""
        places = np.cumsum(lengths)[:-1]
        return map(Chosen, np.split(self.odds, places), np.split(self.said, places))


def load_behaviors(path: Path = SHIPPED) -> list[Behavior]:
    """The behaviors of a file. Raises pydantic's ValidationError: the shipped one is held by tests."""
    return [Behavior.model_validate(row) for row in tomllib.loads(path.read_text("utf-8"))["behavior"]]


def build_behaviors(
    settings: BehaviorSettings, subject: Subject, audit: Path, folder: Path, report: Report = silent
) -> dict[str, Any]:
    """Write `behaviors.json`, `behaviors.parquet` (columns as in `Effect`) and `behaviors.md`.

    Args:
        settings: how much is measured.
        subject: the model and the dictionary.
        audit: folder of its audit, which says which features stand for a concept.
        folder: where to write.
        report: progress, in choices.

    Returns:
        Items of each behavior; changes by features, and those that go beyond all of their controls.

    Raises:
        BehaviorError: the audit left out a concept.
    """
    behaviors, found = load_behaviors(), {row["concept"]: row for row in json.loads((audit / AUDIT).read_text("utf-8"))}
    effects: list[Effect] = []
    counted: dict[str, Any] = {}
    for behavior in behaviors:
        if behavior.concept not in found:
            raise BehaviorError(f"the audit has no concept {behavior.concept!r}: make it whole with `mind-atlas audit`")
        kept = [candidate["feature"] for candidate in found[behavior.concept]["candidates"]]
        best = [feature for feature in kept if subject.max_acts[feature] > 0][: settings.features]
        items = known(subject, behavior)
        counted[f"items_{behavior.name}"] = len(items)
        effects += measure(subject, behavior, items, best, settings, report) if items else []
    table = pa.Table.from_pylist([asdict(effect) for effect in effects])
    pq.write_table(table, folder / TABLE)
    shown = {"behaviors": [b.model_dump(include=_TOLD) | {"n_items": counted[f"items_{b.name}"]} for b in behaviors],
             "effects": table.to_pylist()}  # fmt: skip
    (folder / BEHAVIORS).write_text(json.dumps(shown, ensure_ascii=False, indent=1), "utf-8")
    (folder / MARKDOWN).write_text(markdown(behaviors, effects, counted, subject.site), "utf-8")
    own = [effect for effect in effects if effect.by == "feature"]
    not_finite = sum(not np.isfinite(effect.shift) for effect in effects)
    return counted | {"n_changes": len(own), "n_beyond": len(beyond(own)), "n_not_finite": not_finite}


_TOLD = {"name", "description", "concept", "one_means", "other_means", "instruction"}


def known(subject: Subject, behavior: Behavior) -> list[dict[str, str]]:
    """The items that count: where the model, not yet disturbed, prefers `other`; all when nothing comes before."""
    if not behavior.before:
        return behavior.items
    undisturbed = behavior.model_copy(update={"turns": behavior.before})
    found = Choices(subject, [_choice(subject.lm, undisturbed, item) for item in behavior.items]).under([Condition()])
    return [item for item, odds in zip(behavior.items, found.odds[0], strict=True) if odds < 0]


def measure(
    subject: Subject, behavior: Behavior, items: Sequence[dict[str, str]], best: Sequence[int],
    settings: BehaviorSettings, report: Report = silent,
) -> list[Effect]:  # fmt: skip
    """A behavior under every change of some features, and under the controls of each."""
    choices = Choices(subject, [_choice(subject.lm, behavior, item) for item in items])
    told = Choices(subject, [_choice(subject.lm, behavior, item, behavior.instruction) for item in items])
    total = len(items) * (2 + len(best) * len(CHANGES))
    base, asked = choices.under([Condition()]), told.under([Condition()])
    effects = [
        _effect(behavior.name, None, "none", "nothing", base, base),
        _effect(behavior.name, None, "asked", "words", asked, base),
    ]
    for number, (feature, (change, share)) in enumerate(itertools.product(best, CHANGES.items()), 2):
        steer = Steer(feature, share * settings.strength)
        kinds = with_controls(subject, steer, settings.controls, settings.seed)
        conditions = [condition for some in kinds.values() for condition in some]
        together = choices.under(conditions, partial(_tell, report, number * len(items), total))
        parts = together.split([len(some) for some in kinds.values()])
        effects += _judged(behavior.name, feature, change, dict(zip(kinds, parts, strict=True)), base)
    return effects


def _tell(report: Report, before: int, total: int, done: int) -> None:
    report(before + done, total, "choices")


def _judged(name: str, feature: int, change: str, done: dict[str, Chosen], base: Chosen) -> list[Effect]:
    """The effects of a feature and of its controls; the feature's says how many of the controls go as far."""
    first, *controls = [_effect(name, feature, change, by, chosen, base) for by, chosen in done.items()]
    shifts = {by: np.abs((chosen.odds - base.odds).mean(1)) for by, chosen in done.items()}
    large = sum(int((shifts[control.by] >= abs(first.shift)).sum()) for control in controls)
    return [replace(first, as_large=large), *controls]


def _effect(name: str, feature: int | None, change: str, by: str, done: Chosen, base: Chosen) -> Effect:
    shift = done.odds - base.odds
    low, high = _interval(shift)
    return Effect(
        name, feature, change, by, float(done.odds.mean()), float(shift.mean()), low, high,
        float((done.odds > 0).mean()), float((done.said - base.said).mean()), len(shift), None,
    )  # fmt: skip


def _interval(values: Float[np.ndarray, "draws items"], seed: int = 0) -> tuple[float, float]:
    """95% percentile interval of the mean, draws and items both drawn anew (Efron 1979)."""
    rng = np.random.default_rng(seed)
    draws, items = values.shape
    weights = [rng.multinomial(n, np.full(n, 1 / n), _RESAMPLES) / n for n in (draws, items)]
    means = np.einsum("bd,di,bi->b", weights[0], values, weights[1], optimize=True)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def _choice(lm: LanguageModel, behavior: Behavior, item: dict[str, str], instruction: str = "") -> Choice:
    """An item, filled in."""

    def ids(text: str) -> list[int]:
        return lm.tokenizer(text, add_special_tokens=False).input_ids if text else []

    turns: list[Message] = [{"role": t["role"], "content": t["content"].format(**item)} for t in behavior.turns]
    if turns:
        turns[0] = {**turns[0], "content": f"{instruction} {turns[0]['content']}".strip()}
    text = f"{instruction} {behavior.text.format(**item)}".strip()
    prompt = lm.prompt_ids(turns or text) + ids(behavior.begins)
    one, other = ([ids(way.format(**item)) for way in side] for side in (behavior.one, behavior.other))
    return Choice(prompt, one, other)


class Choices:
    """Choices that a model has read as it is, to be read again under conditions from the steered layer on.

    Ways that differ in their last token alone are read once: those of one token need the prompt alone.
    """

    def __init__(self, subject: Subject, choices: Sequence[Choice]) -> None:
        self._subject, self._choices = subject, choices
        self._stems = [[*dict.fromkeys(tuple(way[:-1]) for way in (*c.one, *c.other))] for c in choices]
        passages = [
            Passage([*choice.prompt, *stem], len(stem) + 1)
            for choice, stems in zip(choices, self._stems, strict=True)
            for stem in stems
        ]
        self._replay = Replay(subject, passages)

    def under(self, conditions: Sequence[Condition], tell: Callable[[int], object] = lambda _: None) -> Chosen:
        """Log-odds of each choice under each condition; `tell` hears how many choices are done."""
        odds, said = (np.zeros((len(conditions), len(self._choices))) for _ in range(2))
        number = itertools.count()
        for column, (choice, stems) in enumerate(zip(self._choices, self._stems, strict=True)):
            ways = [*choice.one, *choice.other]
            of = np.zeros((len(conditions), len(ways)))
            for stem in stems:
                fitting = [i for i, way in enumerate(ways) if tuple(way[:-1]) == stem]
                logprobs = self._logprobs(next(number), len(choice.prompt) + len(stem), conditions)
                shared = logprobs[:, range(len(stem)), stem].sum(1, keepdims=True)
                of[:, fitting] = shared + logprobs[:, -1, [ways[i][-1] for i in fitting]]
            one, other = (np.logaddexp.reduce(side, axis=1) for side in np.split(of, [len(choice.one)], axis=1))
            odds[:, column], said[:, column] = one - other, np.logaddexp(one, other)
            tell(column + 1)
        return Chosen(odds, said)

    def _logprobs(
        self, passage: int, length: int, conditions: Sequence[Condition]
    ) -> Float[np.ndarray, "conditions looked_at vocab"]:
        """Log-probabilities after the last tokens of a passage."""
        step = max(1, _TOKENS // length)
        parts = [conditions[start : start + step] for start in range(0, len(conditions), step)]
        logits = [self._replay.logits(passage, len(p), condition_steering(self._subject, p)) for p in parts]
        return torch.cat(logits).log_softmax(-1).cpu().numpy()


def beyond(effects: Sequence[Effect]) -> list[Effect]:
    """The changes by a feature that no random draw equals, and whose interval is away from 0."""
    return [e for e in effects if e.as_large == 0 and (e.low > 0 or e.high < 0)]


def markdown(behaviors: Sequence[Behavior], effects: Sequence[Effect], counted: dict[str, Any], site: Site) -> str:
    """The numbers of every change and every control, and what they come to."""
    own = [effect for effect in effects if effect.by == "feature"]
    lines = [f"`{site.slug}`\n", _verdict(effects, own)]
    for behavior in behaviors:
        n = counted[f"items_{behavior.name}"]
        left = f", of {len(behavior.items)}: the others it did not know" if n < len(behavior.items) else ""
        lines += [
            f"\n### {behavior.name}\n",
            f"{behavior.description} {n} items{left}. Odds are of {behavior.one_means} over {behavior.other_means}. "
            f'Words: "{behavior.instruction}"\n',
            f"| change | by | feature | shift of ln odds (interval) | {behavior.one_means} preferred | ln said at all "
            "| controls as large |\n|" + " --- |" * 7,
            *(_row(effect, effects) for effect in effects if effect.behavior == behavior.name),
        ]
    return "\n".join([*lines, ""])


def _row(effect: Effect, effects: Sequence[Effect]) -> str:
    large = ""
    if effect.as_large is not None:
        large = f"{effect.as_large} of {sum(e.draws for e in effects if _is_control(e, effect))}"
    number = "" if effect.feature is None else effect.feature
    cells = [
        effect.change, effect.by.replace("_", " "), f"{number}" + (" (its controls)" if "random" in effect.by else ""),
        f"{effect.shift:+.3f} ({effect.low:+.3f} to {effect.high:+.3f})", f"{effect.rate:.0%}", f"{effect.said:+.2f}",
        large,
    ]  # fmt: skip
    return f"| {' | '.join(cells)} |"


def _is_control(other: Effect, effect: Effect) -> bool:
    same = (other.behavior, other.feature, other.change) == (effect.behavior, effect.feature, effect.change)
    return same and other.by != "feature"


def _verdict(effects: Sequence[Effect], own: Sequence[Effect]) -> str:
    """What all of it comes to, luck counted."""
    if not own:
        return (
            "Nothing was measured: the audit has no feature for any of these, or the model knows none of the answers."
        )
    luck = sum(1 / (1 + sum(e.draws for e in effects if _is_control(e, effect))) for effect in own)
    far = beyond(own)
    told = "; ".join(f"{e.behavior}, feature {e.feature} {e.change}: {e.shift:+.2f}" for e in far)
    return (
        f"Of {len(own)} changes by features, {len(far)} shift the odds further than all of their random controls; luck "
        f"alone would give {luck:.1f}." + (f" They are: {told}." if told else "")
    )
