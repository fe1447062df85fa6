"""The texts that are reported, under steering and its controls, and what is measured on them."""

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from sae_core.generation import read_prompt
from sae_core.labels.asker import Question
from sae_core.labels.scoring.embedding import Embedder
from sae_core.progress import Report
from sae_core.steering import Steer
from sae_core.steering_replay import Passage, Replay
from sae_core.steering_report.choosing import Candidate, Choice
from sae_core.steering_report.judge import Grades, question
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
    with_controls,
    word_ids,
    write_texts,
)
from sae_core.study import SteeringReportSettings

REPORTING = (
    "Who are you?", "Give me some advice.", "What happened yesterday?", "Tell me something interesting.",
    "How are you feeling?", "What do you think about people?", "Explain something to me.", "Write a letter.",
)  # fmt: skip
_NAMED = 3
"""Words by which the prompt-only control names the concept."""


class Told(NamedTuple):
    """A text, and what is measured on it whatever the concept."""

    text: Text
    measures: Measures
    embedded: Float[np.ndarray, " width"]
    said: str


class Case(NamedTuple):
    """A feature under one condition, with its texts and those of the model as it is."""

    candidate: Candidate
    condition: str
    strength: float | None
    texts: list[Told]
    base: list[Told]
    place: int
    """Of the feature's words among those that `base` watches."""
    kl_first: float

    def questions(self) -> list[Question]:
        """What a judge is asked of the texts."""
        of = self.candidate
        return [question(of.feature, self.condition, REPORTING[t.text.prompt], of.label, t.said) for t in self.texts]


def measure(
    subject: Subject, chosen: Sequence[Choice], embedder: Embedder, settings: SteeringReportSettings, report: Report
) -> list[Case]:
    """The chosen features at their strengths, and their controls."""
    s = settings
    watched = [tuple(word_ids(subject, choice.candidate.words)) for choice in chosen]
    kinds: list[tuple[int, str]] = []
    conditions = [Condition(watched=tuple(watched))]
    for number, choice in enumerate(chosen):
        for kind, condition in _against(subject, choice, s.seed).items():
            kinds.append((number, kind))
            conditions.append(condition._replace(watched=(watched[number],)))
    texts = _written(subject, conditions[:1], s.seeds + s.base_seeds, s, report)
    texts += [t._replace(condition=t.condition + 1) for t in _written(subject, conditions[1:], s.seeds, s, report)]
    strings = [subject.lm.tokenizer.decode(text.ids, skip_special_tokens=True) for text in texts]
    told: dict[int, list[Told]] = {}
    for one in map(Told, texts, measure_texts(subject, texts), embedder.texts(strings), strings):
        told.setdefault(one.text.condition, []).append(one)
    kl = first_token_kl(subject, REPORTING, conditions).tolist()
    cases = []
    for place, (number, kind) in enumerate(kinds, 1):
        of, strength = chosen[number].candidate, None if kind == "prompt_only" else chosen[number].strength
        if kind == "steered":
            cases.append(Case(of, "base", None, told[0], told[0], number, kl[0]))
        cases.append(Case(of, kind, strength, told[place], told[0], number, kl[place]))
    return cases


def _against(subject: Subject, choice: Choice, seed: int) -> dict[str, Condition]:
    """The feature at its strength, and its controls."""
    of = choice.candidate
    kinds = with_controls(subject, Steer(of.feature, choice.strength), 1, seed)
    words = Condition(instruction=f"Use words such as {', '.join(of.words[:_NAMED])}.")
    steered = {kind: one for kind, some in kinds.items() for one in some}
    return {"steered": steered.pop("feature"), **steered, "prompt_only": words}


def _written(
    subject: Subject, conditions: Sequence[Condition], seeds: int, s: SteeringReportSettings, report: Report
) -> list[Text]:
    return write_texts(subject, REPORTING, conditions, seeds, s.max_tokens, s.temperature, s.seed, report)


def rows(
    subject: Subject, cases: Sequence[Case], embedder: Embedder, grades: Sequence[Sequence[Grades | None]]
) -> Iterator[Row]:
    """A row for each case, given what a judge said of each of its texts."""
    labels = list(dict.fromkeys(case.candidate.label for case in cases))
    names = dict(zip(labels, embedder.names(labels), strict=True))
    for case, graded in zip(cases, grades, strict=True):
        of, words = case.candidate, set(case.candidate.words)
        rates, default = (np.array([concept_rate(subject, t.text, words) for t in x]) for x in (case.texts, case.base))
        own = case.place if case.condition == "base" else 0
        expected = np.array([t.text.watched[:, own].mean() for t in case.texts])
        anyway = np.mean([t.text.watched[:, case.place].mean() for t in case.base])
        least = 0.5 / sum(len(t.text.ids) for t in case.base)
        near = np.array([t.embedded @ names[of.label] for t in case.texts])
        nll = np.mean([t.measures.nll for t in case.texts]) - np.mean([t.measures.nll for t in case.base])
        yield Row(
            of.feature, of.label, ", ".join(of.words[:5]), of.output_score, case.condition, case.strength,
            float(rates.mean()), *bootstrap(rates), float(rates.mean() / max(default.mean(), least)),
            float((rates > 0).mean()), float(expected.mean()), *bootstrap(expected),
            float(expected.mean() / max(anyway, least)), float(near.mean()), *bootstrap(near), math.exp(nll),
            float(np.mean([t.measures.repetition for t in case.texts])), case.kl_first, len(case.texts),
            case.texts[0].said, **_graded([g for g in graded if g]),
        )  # fmt: skip


def _graded(grades: Sequence[Grades]) -> dict[str, Any]:
    """The fields of a row that say what a judge said."""
    if not grades:
        return {}
    overall = np.array([grade.overall for grade in grades])
    means = dict(zip(Grades._fields, np.mean(grades, 0).tolist(), strict=True))
    low, high = bootstrap(overall)
    return means | {
        "n_graded": len(grades), "overall": float(overall.mean()), "overall_low": low, "overall_high": high
    }  # fmt: skip


def first_token_kl(
    subject: Subject, prompts: Sequence[str], conditions: Sequence[Condition]
) -> Float[Tensor, " conditions"]:
    """KL(condition || default) of the first token of an answer, nats, mean over prompts."""
    total = torch.zeros(len(conditions))
    asked: dict[str, list[int]] = defaultdict(list)
    for place, condition in enumerate(conditions):
        asked[condition.instruction].append(place)
    for prompt in prompts:
        default = _first_token(subject, prompt, [Condition()])
        for places in asked.values():
            logprobs = _first_token(subject, prompt, [conditions[place] for place in places])
            total[places] += (logprobs.exp() * (logprobs - default)).sum(1)
    return (total / len(prompts)).clamp(min=0)  # rounding


@torch.no_grad()
def _first_token(subject: Subject, prompt: str, conditions: Sequence[Condition]) -> Float[Tensor, "conditions vocab"]:
    """Log-probabilities of the first token of an answer, under conditions of one instruction."""
    ids = read_prompt(subject.lm, user_says(prompt, conditions[0].instruction)).ids
    logits = Replay(subject, [Passage(ids, 1)]).logits(0, len(conditions), condition_steering(subject, conditions))
    return logits[:, -1].log_softmax(-1).cpu()
