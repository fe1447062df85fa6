"""Labels scored on text that their writer never saw, each beside another feature's label and the lexical one."""

import math
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from jaxtyping import Float

from sae_core.features import Features
from sae_core.labels.asker import Record
from sae_core.labels.client import ChatClient
from sae_core.labels.reader import LabelRow, Score
from sae_core.labels.scoring.embedding import joined
from sae_core.labels.scoring.items import Answers, Item, Names, Scored, Trial, as_item, negatives, positives
from sae_core.labels.scoring.judge import KINDS, Judge, Task, asked_about
from sae_core.labels.scoring.metrics import Pairwise, auc_pairs, rating_pairs
from sae_core.labels.scoring.nearest import Texts
from sae_core.labels.scoring.simulation import Correlation
from sae_core.neighbors import NEIGHBORS
from sae_core.progress import Report
from sae_core.study import LabelSettings

LEAST = 4
"""Texts in which the feature fires, from fewer of which no score is made."""


async def score_labels(
    client: ChatClient, rows: Sequence[LabelRow], others: Sequence[LabelRow], features: Features,
    settings: LabelSettings, neighbors: Path, record: Record, at_once: int, report: Report, texts: Texts | None = None,
) -> Scored:  # fmt: skip
    """Score the written labels among `rows`.

    Args:
        client: asks the judge.
        rows: what the features are called, the first to be judged first.
        others: what other features are called, for the control; they are not scored.
        features: examples and a sample of the text.
        settings: which scorers, on how many texts, and how many features are judged.
        neighbors: folder of the finished neighbors.
        record: told of every question to the judge.
        at_once: features judged at once.
        report: progress, in features scored and then in features judged.
        texts: the sample, searched by text, if it is open already.

    Raises:
        EndpointError: the judge answers nothing.
        ModelError, CatalogError: the sentence-embedding model cannot be loaded, or not be found.
        ArtifactError: the disk is full.
    """
    if not settings.scorers or not any(row.label for row in rows):
        return Scored({}, "")
    scorer = Scorer(settings, features, neighbors, texts)
    trials = scorer.trials(rows, others, report)
    answers = {trial.feature: [scorer.embed(trial)] * ("embedding" in settings.scorers) for trial in trials}
    tasks = tasks_of(settings)
    judge = Judge(client, record, settings.asks_each)
    judged = trials[: settings.judged_of(len(trials))]
    for feature, found in (await judge.judge_all(judged, tasks, at_once, report)).items():
        answers[feature] += found
    n_levels = max((item.level for trial in trials for item in trial.items), default=0)
    fields = {t.feature: _fields(t, [score(t, found, n_levels) for found in answers[t.feature]]) for t in trials}
    return Scored(fields, judge.stopped)


def tasks_of(settings: LabelSettings) -> list[Task]:
    """What the judge is asked to do."""
    return [task for task in KINDS if task in settings.scorers]


def _fields(trial: Trial, scores: Sequence[Score]) -> dict[str, Any]:
    found = {"scores": tuple(scores), "shuffled_from": trial.shuffled_from, "beats_control": beats_control(scores)}
    return found if scores else {}


class Scorer:
    """Scores the labels of one dictionary.

    Args:
        settings: which scorers, and on how many texts.
        features: examples and a sample of the text.
        neighbors: folder of the finished neighbors.
        texts: the sample, searched by text, if it is open already.
    """

    def __init__(
        self, settings: LabelSettings, features: Features, neighbors: Path, texts: Texts | None = None
    ) -> None:
        self.settings = settings
        self.features = features
        self._folder = neighbors
        self.texts = texts or Texts(settings.embedder, features)

    @cached_property
    def _pairs(self) -> pa.Table:
        columns = ["feature", "rank", "neighbor"]
        return pq.read_table(self._folder / NEIGHBORS, columns=columns).sort_by("rank")

    def trials(self, rows: Sequence[LabelRow], others: Sequence[LabelRow], report: Report) -> list[Trial]:
        """The written labels among `rows` with their texts, in order; none for a feature with too few texts."""
        written = [row for row in rows if row.label]
        asked = {row.feature for row in rows}
        named = [*written, *(row for row in others if row.label and row.feature not in asked)]
        found = []
        for done, row in enumerate(written, 1):
            report(done, len(written), "scored")
            items = self._items(row)
            if sum(item.fires for item in items) >= LEAST and any(not item.fires for item in items):
                other = shuffled_from(row, named, self.settings.seed)
                names = Names(row.label, other.label if other else None, row.lexical)
                found.append(Trial(row.feature, names, other.feature if other else None, items))
        return found

    def embed(self, trial: Trial) -> Answers:
        """Similarity of each name and text."""
        embedder = self.texts.embedder
        texts = embedder.texts([joined(item.tokens[item.shown]) for item in trial.items])
        names = trial.names.given()
        similarity = embedder.names(list(names.values())) @ texts.T
        return Answers("embedding", dict(zip(names, similarity, strict=True)))

    def _items(self, row: LabelRow) -> list[Item]:
        examples = self.features.examples(row.feature)
        seed = self.settings.seed * 1_000_003 + row.feature
        shown = [examples[i] for i in row.examples]
        others = self.texts.silent(row.feature, shown, self.settings.contrast)
        seen = {example.document for example in (*shown, *others)}
        chosen = positives(examples, seen, self.settings.score_examples, seed)
        if not chosen:
            return []
        neighbors = self.neighbors(row.feature)
        silent = negatives(self.texts.sample, row.feature, neighbors, chosen, seen, self.texts.nearest, seed)
        items = [*map(as_item, chosen), *silent]
        return [items[i] for i in np.random.default_rng(seed).permutation(len(items))]

    def neighbors(self, feature: int) -> list[int]:
        """Features with similar decoder rows, nearest first."""
        return self._pairs.filter(pc.field("feature") == feature)["neighbor"].to_pylist()


def shuffled_from(row: LabelRow, written: Sequence[LabelRow], seed: int) -> LabelRow | None:
    """Another feature, drawn at random of those whose label is not the same; None when there is none."""
    others = [other for other in written if other.label.casefold() != row.label.casefold()]
    if not others:
        return None
    return others[int(np.random.default_rng([seed, row.feature]).integers(len(others)))]


def score(trial: Trial, answers: Answers, n_levels: int) -> Score:
    """What the answers are worth."""
    asked = asked_about(trial, answers.scorer)
    items = [trial.items[i] for i in asked]
    said = {kind: says[asked] for kind, says in answers.says.items()}
    measure = _measure(answers.scorer, items)

    def worth(kind: str, kept: Callable[[Item], bool] = lambda item: True) -> float | None:
        """What one of the names gets on some of the texts."""
        return measure.mean(said[kind], np.array([kept(item) for item in items])) if kind in said else None

    def against(stratum: str) -> float | None:
        some = any(item.stratum == stratum for item in items)
        return worth("own", lambda item: item.fires or item.stratum == stratum) if some else None

    low, high = measure.interval(said["own"])
    margin = measure.interval(said["own"], said["shuffled"]).low if "shuffled" in said else math.nan
    n_firing = sum(item.fires for item in items)
    return Score(
        answers.scorer, worth("own"), _finite(low), _finite(high), worth("shuffled"), worth("lexical"), _finite(margin),
        against("random"), against("nearest"), against("neighbor"),
        [worth("own", lambda item, i=i: item.level in (0, i)) for i in range(1, n_levels + 1)],  # type: ignore[misc]
        _failed(said["own"]), n_firing, len(items) - n_firing, answers.prompt_tokens, answers.completion_tokens,
    )  # fmt: skip


def beats_control(scores: Sequence[Score]) -> bool | None:
    """See `LabelRow.beats_control`."""
    by = {score.scorer: score for score in scores}
    first = next((by[name] for name in ("detection", "fuzzing", "embedding") if name in by), None)
    return None if first is None or first.margin_low is None else first.margin_low > 0


def _measure(scorer: str, items: list[Item]) -> Pairwise | Correlation:
    """How a scorer's answers are made into a score."""
    if scorer == "simulation":
        return Correlation(items)
    pairs = rating_pairs if scorer == "specificity" else auc_pairs
    return Pairwise(pairs, np.array([item.fires for item in items]))


def _failed(says: Float[np.ndarray, "texts ..."]) -> float:
    """Share of the texts of which nothing was said that can be read."""
    return float(np.isnan(says.reshape(len(says), -1)).all(1).mean())


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
