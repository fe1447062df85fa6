"""How well each feature steers, found once for all of them.

An *output score* says whether turning the feature up makes the model say the tokens that its direction promotes. What
a feature fires on tells little of that: few features do both, and steering with the others fails (Arad et al. 2025).
The score is ours in detail: one steered pass over neutral prompts, and how far the promoted tokens climb in rank.

For the features of the highest scores a short search finds the largest strength at which texts stay fluent.
"""

import math
from collections.abc import Sequence
from contextlib import ExitStack
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
from sae_core.features import Features
from sae_core.features.logits import logit_effects
from sae_core.language_model import LanguageModel
from sae_core.names import Site
from sae_core.progress import Report, silent
from sae_core.steering import Steer, Steering
from sae_core.steering_texts import Condition, Subject, measure_texts, write_texts
from sae_core.study import ModelSettings, SteeringSettings

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
    settings: SteeringSettings, model: ModelSettings, site: Site, sink_norm: float, dictionary: Path, features: Path,
    folder: Path, device: str = "cpu", report: Report = silent,
) -> dict[str, Any]:  # fmt: skip
    """Write `scores.parquet` into `folder`: a row for each feature, empty where nothing was measured.

    Columns: feature; output_score, -1 to 1; probability_gain; role, `output` where the score is above that of 95% of
    random directions of the same length, else `input`; suggested_strength, 0 where even the least was not fluent.

    Args:
        settings: what is measured.
        model: the language model, run in float32.
        site: where the dictionary reads it.
        sink_norm: norm above which an activation is an attention sink.
        dictionary: folder of the finished dictionary.
        features: folder of its features.
        folder: where to write.
        device: where to compute.
        report: progress, in features.

    Returns:
        Numbers of features scored, of those that are `output`, and with a strength; the score that random directions
        stay below, the median score.
    """
    lm = LanguageModel.load(model, device, precision="float32")
    subject = Subject.open(lm, site, dictionary, features, sink_norm)
    scored = live_features(features, settings.scored)
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


def live_features(features: Path, limit: int | None = None) -> Int[np.ndarray, " n"]:
    """Numbers of the features that fire at all, in order; with a limit, of those with the largest maxima."""
    table = Features.open(features).table()
    maxima = table["max_act"].to_numpy()
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
    """The neutral prompts, read by the model up to the layer of the site; from there on it runs for many features."""

    def __init__(self, subject: Subject, settings: SteeringSettings) -> None:
        self._subject, self._settings = subject, settings
        lm, site = subject.lm, subject.site
        self._prompts = [torch.tensor([lm.prompt_ids(text)], device=lm.device) for text in NEUTRAL]
        self._inputs = [lm.capture("resid_pre", site.layer, ids) for ids in self._prompts]
        self._before = [lm.logits(ids)[0, -1].float() for ids in self._prompts]
        self._resumes = True
        alike = (torch.allclose(self._logits(n, 1)[0], b, rtol=1e-2, atol=1e-2) for n, b in enumerate(self._before))
        self._resumes = all(alike)

    def effect(self, features: list[int], directions: Float[Tensor, "features d_model"]) -> _Effect:
        subject, n = self._subject, self._settings.promoted_tokens
        promoted = logit_effects(directions, subject.unembedding, subject.shown, n).promoted
        steers = [Steer(feature, self._settings.probe_strength) for feature in features]
        steering = subject.steering(steers, torch.eye(len(steers), dtype=torch.bool), directions)
        score, gain = torch.zeros(len(features)), torch.zeros(len(features))
        for number, logits in enumerate(self._before):
            before = logits.expand(len(features), -1)
            after = self._logits(number, len(features), steering)
            climbed = _ranks(before, promoted).log() - _ranks(after, promoted).log()
            score += climbed.mean(1).cpu() / math.log(logits.shape[-1])
            gain += (_probability(after, promoted) - _probability(before, promoted)).cpu()
        return _Effect((score / len(NEUTRAL)).numpy(), (gain / len(NEUTRAL)).numpy())

    @torch.no_grad()
    def _logits(self, number: int, rows: int, steering: Steering | None = None) -> Float[Tensor, "rows vocab"]:
        """Logits after a prompt, in as many rows; the layers before the site run only where they must."""
        lm, ids = self._subject.lm, self._prompts[number].expand(rows, -1)
        with ExitStack() as stack:
            if self._resumes:
                acts = self._inputs[number].expand(rows, -1, -1)
                stack.enter_context(lm.resumed(self._subject.site.layer, acts))
            if steering is not None:
                stack.enter_context(steering.applied(lm))
            return lm.next_logits(ids)


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
    texts = write_texts(
        subject, _SUGGESTING, conditions, 1, settings.max_tokens, settings.temperature, settings.seed, report
    )
    measured = measure_texts(subject, texts)
    base = np.mean([m.nll for t, m in zip(texts, measured, strict=True) if t.condition == 0])
    found = {}
    for place, feature in enumerate(features):
        found[feature] = 0.0
        for step, strength in enumerate(tried):
            own = [m for t, m in zip(texts, measured, strict=True) if t.condition == 1 + place * len(tried) + step]
            ratio = math.exp(np.mean([m.nll for m in own]) - base)
            if ratio > settings.perplexity_ratio_max or np.mean([m.repetition for m in own]) > settings.repetition_max:
                break
            found[feature] = strength
    return found
