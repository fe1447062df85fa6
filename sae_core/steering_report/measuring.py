"""Texts of both halves of the prompts, under steering and its controls, and what is measured on them."""

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae_core.generation import read_prompt
from sae_core.progress import Report
from sae_core.steering import Steer
from sae_core.steering_report.choosing import Chosen, choose_features
from sae_core.steering_report.rows import Row
from sae_core.steering_texts import (
    Condition,
    Measures,
    Subject,
    Text,
    bootstrap,
    concept_rate,
    condition_steering,
    measure_texts,
    user_says,
    write_texts,
)
from sae_core.study import SteeringReportSettings

CHOOSING = ("Tell me about your day.", "Write a short story.", "What should I do this weekend?", "Describe a room.")
REPORTING = ("Who are you?", "Give me some advice.", "What happened yesterday?", "Tell me something interesting.")
_WORDS = 3
"""Words by which the prompt-only control names the concept."""


def measure(
    subject: Subject, scores: Path, rates: Mapping[str, float], settings: SteeringReportSettings, report: Report
) -> list[Row]:
    """Both halves: every strength of every feature that is chosen, then the chosen strength and its controls."""
    first = _Half(subject, "choose", CHOOSING, settings, report)
    base_texts = first.write_base()
    chosen = choose_features(subject, scores, settings, rates, base_texts)
    if not chosen:
        return []
    strengths = sorted(settings.strengths)
    first.write([Condition(Steer(c.feature, s)) for c in chosen for s in strengths])
    second = _Half(subject, "report", REPORTING, settings, report)
    second_base = second.write_base()
    rows, best = [], []
    for place, item in enumerate(chosen):
        tried = [
            first.row(1 + place * len(strengths) + step, item, "steered", strength, base_texts)
            for step, strength in enumerate(strengths)
        ]
        fluent = [row for row in tried if row.perplexity_ratio <= settings.perplexity_ratio_max] or tried[:1]
        best.append(max(fluent, key=lambda row: (row.concept_rate, row.strength)))
        rows += [row._replace(chosen=row is best[-1]) for row in tried]
    second.write([c for item, row in zip(chosen, best, strict=True) for c in _against(subject, item, row, settings)])
    base_texts = base_texts + second_base
    kinds = ("steered", "random_direction", "random_feature", "prompt_only")
    for place, (item, row) in enumerate(zip(chosen, best, strict=True)):
        rows.append(second.row(0, item, "base", None, base_texts))
        for step, kind in enumerate(kinds):
            strength = None if kind == "prompt_only" else row.strength
            rows.append(second.row(1 + place * len(kinds) + step, item, kind, strength, base_texts))
    return rows


def _against(subject: Subject, item: Chosen, row: Row, settings: SteeringReportSettings) -> list[Condition]:
    """The feature at its strength, and the controls."""
    assert row.strength is not None, "what is chosen among strengths has one"
    steer = Steer(item.feature, row.strength)
    alive = np.flatnonzero(subject.max_acts.numpy() > 0)
    others = alive[alive != item.feature] if len(alive) > 1 else alive
    other = int(np.random.default_rng([settings.seed, item.feature]).choice(others))
    direction = subject.random_directions(1, settings.seed + item.feature)[0]
    words = f"Use words such as {', '.join(item.concept[:_WORDS])}."
    return [
        Condition(steer),
        Condition(steer, direction),
        Condition(Steer(other, row.strength)),
        Condition(instruction=words),
    ]


class _Half:
    """The texts of one half of the prompts, measured."""

    def __init__(
        self, subject: Subject, name: str, prompts: Sequence[str], settings: SteeringReportSettings, report: Report
    ) -> None:
        self._subject, self._name, self._prompts, self._settings, self._report = (
            subject,
            name,
            prompts,
            settings,
            report,
        )

    def write_base(self) -> list[Text]:
        """What the model says as it is: more texts than of other conditions, as all of them are held against these."""
        self._texts = self._written([Condition()], self._settings.seeds + self._settings.base_seeds)
        return list(self._texts)

    def write(self, conditions: Sequence[Condition]) -> None:
        """Write the texts of further conditions, numbered from 1, and measure all."""
        texts = self._written(conditions, self._settings.seeds)
        self._texts += [text._replace(condition=text.condition + 1) for text in texts]
        self._measures = measure_texts(self._subject, self._texts)
        if self._name == "report":
            self._kl = first_token_kl(self._subject, self._prompts, [Condition(), *conditions]).tolist()
        else:
            self._kl = [math.nan] * (1 + len(conditions))

    def _written(self, conditions: Sequence[Condition], seeds: int) -> list[Text]:
        s = self._settings
        return write_texts(
            self._subject, self._prompts, conditions, seeds, s.max_tokens, s.temperature, s.seed, self._report
        )

    def of(self, condition: int) -> list[Text]:
        """Texts of a condition."""
        return [text for text in self._texts if text.condition == condition]

    def _measures_of(self, condition: int) -> list[Measures]:
        return [m for text, m in zip(self._texts, self._measures, strict=True) if text.condition == condition]

    def row(self, condition: int, item: Chosen, kind: str, strength: float | None, base_texts: Sequence[Text]) -> Row:
        """What is measured of a feature's words in the texts of a condition."""
        texts, measures, base = self.of(condition), self._measures_of(condition), self._measures_of(0)
        words = set(item.concept)
        rates = np.array([concept_rate(self._subject, text, words) for text in texts])
        default = np.mean([concept_rate(self._subject, text, words) for text in base_texts])
        least = 0.5 / sum(len(text.ids) for text in base_texts)
        low, high = bootstrap(rates)
        return Row(
            item.feature, ", ".join(item.concept[:5]), item.output_score, self._name, kind, strength, True,
            float(rates.mean()), low, high, float(rates.mean() / max(default, least)), float((rates > 0).mean()),
            math.exp(np.mean([m.nll for m in measures]) - np.mean([m.nll for m in base])),
            float(np.mean([m.repetition for m in measures])), self._kl[condition], len(texts),
            self._subject.lm.tokenizer.decode(texts[0].ids, skip_special_tokens=True),
        )  # fmt: skip


@torch.no_grad()
def first_token_kl(
    subject: Subject, prompts: Sequence[str], conditions: Sequence[Condition]
) -> Float[Tensor, " conditions"]:
    """KL(condition || default) of the first token of an answer, nats, mean over prompts."""
    total = torch.zeros(len(conditions))
    for prompt in prompts:
        default = _first_token(subject, prompt, Condition())
        for place, condition in enumerate(conditions):
            logprobs = _first_token(subject, prompt, condition)
            total[place] += (logprobs.exp() * (logprobs - default)).sum()
    return total / len(prompts)


def _first_token(subject: Subject, prompt: str, condition: Condition) -> Float[Tensor, " vocab"]:
    """Log-probabilities of the first token of an answer."""
    ids = torch.tensor([read_prompt(subject.lm, user_says(prompt, condition.instruction)).ids])
    steering = condition_steering(subject, [condition])
    with steering.applied(subject.lm) if steering else nullcontext():
        return subject.lm.logits(ids)[0, -1].float().log_softmax(-1).cpu()
