"""Which features are reported, and at which strength: by rule, not by hand, on prompts that report nothing.

Nothing is sampled here but texts of the model as it is. At each of their places the probabilities of the next token say
what share of a text would be a feature's words, and what its perplexity would be, if it were drawn under steering. This
is free of the luck of drawing, which hides a word said once in a thousand tokens. It knows nothing of how one odd word
leads to another: texts that are really written under steering drift, and are less fluent.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from sae_core.generation import probabilities
from sae_core.labels.reader import Labels
from sae_core.progress import Report
from sae_core.steering import Steer
from sae_core.steering_replay import Passage, Replay
from sae_core.steering_scores import SCORES
from sae_core.steering_texts import Condition, Subject, condition_steering, word_ids, write_texts
from sae_core.study import SteeringReportSettings

CHOICES = "choices.parquet"
CHOOSING = ("Tell me about your day.", "Write a short story.", "What should I do this weekend?", "Describe a room.")
SELDOM = 5e-4
"""Rates are held against at least this: half a word in a thousand tokens, ten times of which one could notice."""
CHOICES_SCHEMA = pa.schema(
    [
        ("feature", pa.int32()), ("words", pa.string()), ("output_score", pa.float32()), ("strength", pa.float32()),
        ("rate", pa.float32()), ("base_rate", pa.float32()), ("perplexity_ratio", pa.float32()),
        ("chosen", pa.bool_()),
    ]
)  # fmt: skip


class Candidate(NamedTuple):
    """A feature with words of its own."""

    feature: int
    output_score: float
    words: list[str]
    label: str
    """What it is called: the written label, else the lexical one."""
    base_rate: float = math.nan
    """Expected share of its words in texts of the model as it is."""


class Choice(NamedTuple):
    """What a strength promises."""

    candidate: Candidate
    strength: float
    rate: float
    """Expected share of tokens that are the feature's words."""
    perplexity_ratio: float
    """Expected perplexity under the model as it is, over that of its own texts."""
    chosen: bool = False

    @property
    def rise(self) -> float:
        """How many times as frequent the words become, as far as one would notice."""
        return self.rate / max(self.candidate.base_rate, SELDOM)

    def row(self) -> dict[str, object]:
        """As in `CHOICES_SCHEMA`."""
        of = self.candidate
        return {
            "feature": of.feature, "words": ", ".join(of.words), "output_score": of.output_score,
            "strength": self.strength, "rate": self.rate, "base_rate": of.base_rate,
            "perplexity_ratio": self.perplexity_ratio, "chosen": self.chosen,
        }  # fmt: skip


def choose(
    subject: Subject, scores: Path, labels: Path, rates: Mapping[str, float], settings: SteeringReportSettings,
    report: Report,
) -> list[Choice]:  # fmt: skip
    """Every strength of every candidate; of the features that promise most, one strength each is chosen.

    Candidates are the features of the highest output scores that have words of their own (see `candidates`). Of the
    strengths that promise a perplexity within the bound, a feature's is that of the most words; the features are those
    whose words then become the most frequent in terms of how frequent they are anyway.
    """
    forecast = Forecast(subject, settings)
    found = candidates(subject, scores, labels, rates, settings, forecast)
    choices: list[Choice] = []
    best: list[Choice] = []
    for done, candidate in enumerate(found, 1):
        tried = forecast.of(candidate)
        choices += tried
        fluent = [choice for choice in tried if choice.perplexity_ratio <= settings.forecast_ratio_max]
        best += sorted(fluent, key=lambda choice: (choice.rate, choice.strength))[-1:]
        report(done, len(found), "candidates")
    best.sort(key=lambda choice: -choice.rise)
    kept = {(choice.candidate.feature, choice.strength) for choice in best[: settings.features]}
    return [choice._replace(chosen=(choice.candidate.feature, choice.strength) in kept) for choice in choices]


def candidates(
    subject: Subject, scores: Path, labels: Path, rates: Mapping[str, float], settings: SteeringReportSettings,
    forecast: "Forecast",
) -> list[Candidate]:  # fmt: skip
    """The features of the highest output scores that have words of their own for the judge to look for.

    Words that are said anyway cannot be said ten times as often. Only words count that are rare by `rates`, those of
    the corpus (see `Subject.concept`), and only features whose words together are rare in what the model says anyway.
    """
    table = pq.read_table(scores / SCORES, columns=["feature", "output_score"]).to_pylist()
    scored = sorted((r for r in table if r["output_score"] is not None), key=lambda r: -r["output_score"])
    named, found = Labels.open(labels), list[Candidate]()
    for row in scored:
        if len(found) == settings.candidates:
            break
        words = subject.concept(subject.features.feature(row["feature"]), rates, settings.word_rate_max)
        if len(words) >= settings.words_min and (base := forecast.base_rate(words)) <= settings.base_rate_max:
            name = named.label(row["feature"]).name
            found.append(Candidate(row["feature"], row["output_score"], words, name, base))
    return found


class Forecast:
    """What texts would be if they were drawn under steering, by the probabilities along texts of the model as it is."""

    def __init__(self, subject: Subject, settings: SteeringReportSettings) -> None:
        s = settings
        texts = write_texts(subject, CHOOSING, [Condition()], 1, s.max_tokens, s.temperature, s.seed)
        passages = [Passage(text.prompt_ids + text.ids[:-1], len(text.ids)) for text in texts if text.ids]
        self._subject, self._settings = subject, settings
        self._replay = Replay(subject, passages)
        self._plain = [logits.log_softmax(-1) for logits in self._replay.before]
        self._drawn = torch.cat([probabilities(logits, s.temperature) for logits in self._replay.before])
        self._nll = -float((self._drawn * torch.cat(self._plain)).sum(-1).mean())

    def base_rate(self, words: Sequence[str]) -> float:
        """Expected share of the words in texts of the model as it is."""
        return float(self._drawn[:, word_ids(self._subject, words)].sum(-1).mean())

    def of(self, candidate: Candidate) -> list[Choice]:
        """What each strength promises."""
        strengths, temperature = sorted(self._settings.strengths), self._settings.temperature
        conditions = [Condition(Steer(candidate.feature, strength)) for strength in strengths]
        steering, ids = condition_steering(self._subject, conditions), word_ids(self._subject, candidate.words)
        rates, nlls = [], []
        for number, plain in enumerate(self._plain):
            drawn = probabilities(self._replay.logits(number, len(strengths), steering), temperature)
            rates.append(drawn[..., ids].sum(-1))
            nlls.append(-(drawn * plain).sum(-1))
        rate, nll = (torch.cat(parts, 1).mean(1).tolist() for parts in (rates, nlls))
        of = zip(strengths, rate, nll, strict=True)
        return [Choice(candidate, s, r, float(np.exp(n - self._nll))) for s, r, n in of]
