"""How well each feature steers, found once for all of them.

An *output score* says whether turning the feature up makes the model say the tokens that its direction promotes. What
a feature fires on tells little of that: few features do both, and steering with the others fails (Arad et al. 2025).
The score is ours in detail: one steered pass over neutral prompts, and how far the promoted tokens climb in rank.

For the features of the highest scores a short search finds the largest strength at which texts stay fluent; for any
other it is made when somebody asks (`search_strength`).
"""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from jaxtyping import Float, Float32, Int
from torch import Tensor

from sae_core.artifacts import write_atomically
from sae_core.by_feature import ROW_GROUP
from sae_core.features.logits import logit_effects
from sae_core.progress import Report, silent
from sae_core.steering import Steer
from sae_core.steering_replay import Passage, Replay
from sae_core.steering_texts import Condition, Measures, Subject, measure_texts, write_texts
from sae_core.steers import check_steers
from sae_core.study import SteeringSettings

SCORES = "scores.parquet"
NEUTRAL = ("I think that", "There is a")
"""Beginnings that could go on in any way."""
_BATCH = 128
"""Features in one pass."""
_NULL = 64
"""Random directions whose scores say what any direction does."""
_SUGGESTING = ("Tell me about your day.", "Write a short story.", "Describe a room.")
_SCHEMA = pa.schema(
    [
        ("feature", pa.int32()), ("output_score", pa.float32()), ("probability_gain", pa.float32()),
        ("role", pa.string()), ("suggested_strength", pa.float32()),
    ]
)  # fmt: skip


class _Effect(NamedTuple):
    """What one steered pass does to a feature's promoted tokens."""

    score: Float32[np.ndarray, " features"]
    """Mean over prompts and tokens of ln(rank before / rank after), over ln(vocabulary): 1 is from last to first."""
    gain: Float32[np.ndarray, " features"]
    """Mean over prompts of the probability that all of them together gain."""


def build_steering(
    settings: SteeringSettings, subject: Subject, folder: Path, report: Report = silent
) -> dict[str, Any]:
    """Write `scores.parquet` into `folder`: a row for each feature, empty where nothing was measured.

    Columns: feature; output_score, -1 to 1; probability_gain; role, `output` where the score is above that of 95% of
    random directions of the same length, else `input`; suggested_strength, 0 where even the least was not fluent.

    Args:
        settings: what is measured.
        subject: the model and the dictionary.
        folder: where to write.
        report: progress, in features.

    Returns:
        Numbers of features scored, of those that are `output`, and with a strength; the score that random directions
        stay below, the median score.
    """
    scored = live_features(subject, settings.scored)
    effects = output_effects(subject, scored, settings, report)
    null = random_effects(subject, scored, settings)
    bound = float(np.quantile(null.score, 0.95)) if len(null.score) else math.nan
    table = {"feature": scored, "output_score": effects.score, "probability_gain": effects.gain}
    best = scored[np.argsort(-effects.score, kind="stable")][: settings.suggested]
    strengths = suggest_strengths(subject, best.tolist(), settings, report)
    rows = pa.table(
        {
            **table,
            "role": np.where(effects.score > bound, "output", "input"),
            "suggested_strength": pa.array([strengths.get(i) for i in scored.tolist()], pa.float32()),
        },
        _SCHEMA,
    )
    every = pa.table({"feature": pa.array(range(subject.dictionary.d_sae), pa.int32())})
    with write_atomically(folder / SCORES) as path:
        pq.write_table(every.join(rows, "feature").sort_by("feature"), path, row_group_size=8 * ROW_GROUP)
    return {
        "n_scored": len(scored),
        "n_not_finite": int((~np.isfinite(effects.score)).sum()),
        "n_output": int((effects.score > bound).sum()),
        "n_suggested": sum(strength > 0 for strength in strengths.values()),
        "random_direction_score_p95": bound,
        "median_output_score": float(np.median(effects.score)) if len(scored) else math.nan,
    }


def live_features(subject: Subject, limit: int | None = None) -> Int[np.ndarray, " n"]:
    """Numbers of the features that fire at all, in order; with a limit, of those with the largest maxima."""
    maxima = subject.max_acts.numpy()
    alive = np.flatnonzero(maxima > 0)
    return np.sort(alive[np.argsort(-maxima[alive], kind="stable")][:limit])


def output_effects(
    subject: Subject, features: Int[np.ndarray, " features"], settings: SteeringSettings, report: Report = silent
) -> _Effect:
    """What turning each feature up does to the tokens that its own decoder row promotes."""
    W_dec = subject.dictionary.W_dec
    scorer, parts = _Scorer(subject, settings), []
    for start in range(0, len(features), _BATCH):
        some = features[start : start + _BATCH].tolist()
        parts.append(scorer.effect(some, W_dec[some]))
        report(start + len(some), len(features), "features")
    return _joined(parts)


def random_effects(subject: Subject, features: Int[np.ndarray, " features"], settings: SteeringSettings) -> _Effect:
    """The same of random directions, each as far as a random feature goes."""
    rng = np.random.default_rng(settings.seed)
    some = rng.permutation(features)[:_NULL].tolist()
    scorer = _Scorer(subject, settings)
    return _joined([scorer.effect(some, subject.random_directions(len(some), settings.seed))] if some else [])


def _joined(parts: Sequence[_Effect]) -> _Effect:
    empty = np.empty(0, np.float32)
    return (
        _Effect(*(np.concatenate([empty, *column]) for column in zip(*parts, strict=True)))
        if parts
        else _Effect(empty, empty)
    )


class _Scorer:
    """The neutral prompts, and what follows them under the steering of many features."""

    def __init__(self, subject: Subject, settings: SteeringSettings) -> None:
        self._subject, self._settings = subject, settings
        self._replay = Replay(subject, [Passage(subject.lm.prompt_ids(text), 1) for text in NEUTRAL])

    def effect(self, features: list[int], directions: Float[Tensor, "features d_model"]) -> _Effect:
        subject, n = self._subject, self._settings.promoted_tokens
        promoted = logit_effects(directions, subject.unembedding, subject.shown, n).promoted
        steers = [Steer(feature, self._settings.probe_strength) for feature in features]
        steering = subject.steering(steers, torch.eye(len(steers), dtype=torch.bool), directions)
        score, gain = torch.zeros(len(features)), torch.zeros(len(features))
        for number, logits in enumerate(self._replay.before):
            before = logits.expand(len(features), -1)
            after = self._replay.logits(number, len(features), steering)[:, -1]
            climbed = _ranks(before, promoted).log() - _ranks(after, promoted).log()
            score += climbed.mean(1).cpu() / math.log(logits.shape[-1])
            gain += (_probability(after, promoted) - _probability(before, promoted)).cpu()
        return _Effect((score / len(NEUTRAL)).numpy(), (gain / len(NEUTRAL)).numpy())


def _ranks(logits: Float[Tensor, "rows vocab"], tokens: Int[Tensor, "rows n"]) -> Float[Tensor, "rows n"]:
    """Rank of each token, 1 the likeliest."""
    own = logits.gather(1, tokens)
    return torch.stack([(logits > own[:, i, None]).sum(1) + 1.0 for i in range(tokens.shape[1])], dim=1)


def _probability(logits: Float[Tensor, "rows vocab"], tokens: Int[Tensor, "rows n"]) -> Float[Tensor, " rows"]:
    return logits.softmax(-1).gather(1, tokens).sum(1)


def suggest_strengths(
    subject: Subject, features: Sequence[int], settings: SteeringSettings, report: Report = silent
) -> dict[int, float]:
    """For each feature the largest strength tried up to which all are fluent; 0 when the least is not."""
    tried = sorted(settings.strengths)
    conditions = [Condition(), *(Condition(Steer(i, strength)) for i in features for strength in tried)]
    if len(conditions) == 1:
        return {}
    plain, *steered = _by_condition(subject, _SUGGESTING, conditions, settings, settings.seed, report)
    return {
        feature: _fluent_up_to(plain, steered[place * len(tried) : (place + 1) * len(tried)], settings)
        for place, feature in enumerate(features)
    }


def search_strength(subject: Subject, feature: int, settings: SteeringSettings) -> Iterator[float]:
    """The same for one feature that somebody asks about: by the first prompt, by the first two, and by all.

    Raises SteeringError for a feature that is not there or dead.
    """
    check_steers([Steer(feature, 1.0)], subject.max_acts.numpy())
    conditions = [Condition(), *(Condition(Steer(feature, strength)) for strength in sorted(settings.strengths))]
    found: list[list[Measures]] = [[] for _ in conditions]
    for number, prompt in enumerate(_SUGGESTING):
        own = _by_condition(subject, [prompt], conditions, settings, settings.seed + number)
        for all_, some in zip(found, own, strict=True):
            all_ += some
        yield _fluent_up_to(found[0], found[1:], settings)


def _by_condition(
    subject: Subject, prompts: Sequence[str], conditions: Sequence[Condition], settings: SteeringSettings, seed: int,
    report: Report = silent,
) -> list[list[Measures]]:  # fmt: skip
    """Measures of each condition's texts."""
    texts = write_texts(subject, prompts, conditions, 1, settings.max_tokens, settings.temperature, seed, report)
    found: list[list[Measures]] = [[] for _ in conditions]
    for text, measures in zip(texts, measure_texts(subject, texts), strict=True):
        found[text.condition].append(measures)
    return found


def _fluent_up_to(
    plain: Sequence[Measures], steered: Sequence[Sequence[Measures]], settings: SteeringSettings
) -> float:
    """The largest strength up to which all texts are fluent, given those of each; 0 when not even the least is."""
    base, found = np.mean(plain, 0)[0], 0.0
    for strength, own in zip(sorted(settings.strengths), steered, strict=True):
        nll, repeated = np.mean(own, 0).tolist()  # the first is no number after an empty answer, which says nothing
        if math.exp(nll - base) > settings.perplexity_ratio_max or repeated > settings.repetition_max:
            break
        found = strength
    return found
