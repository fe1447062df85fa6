"""The labels stage: which features are asked about, and the table that comes of it."""

import asyncio
import os
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sae_core.artifacts import write_atomically
from sae_core.by_feature import ROW_GROUP
from sae_core.features import FeatureRow, Features
from sae_core.labels import prompts
from sae_core.labels.asker import recorder
from sae_core.labels.carry import Previous, carry_over, held_before
from sae_core.labels.endpoint import label_writer
from sae_core.labels.labeler import Labeler, Outcome
from sae_core.labels.labelers import Earlier, keep_earlier
from sae_core.labels.lexical import lexical_label
from sae_core.labels.reader import ATTEMPTS, LABELS, SCHEMA, LabelError, LabelRow, Labels
from sae_core.labels.scoring.items import Scored
from sae_core.progress import Report, silent
from sae_core.study import LabelSettings, ModelSettings

if TYPE_CHECKING:
    from sae_core.labels.scoring.nearest import Texts  # brings torch

MIN_FIRED = 20
"""Features that fired less often are asked about last: too few examples to judge by."""
MAX_DENSITY = 0.01
"""Features that fire on a larger share of the tokens are asked about last: they are punctuation, or no one thing."""
_SHOWN = 10  # labels in the summary


class Ground(NamedTuple):
    """What labels are scored with and found by, besides features."""

    model: ModelSettings
    """The language model under study, whose token vectors say what names mean."""
    neighbors: Path
    """Folder of the finished neighbors."""


def build_labels(
    settings: LabelSettings, features: Path, folder: Path, report: Report = silent, api_key: str | None = None,
    only: Sequence[int] = (), finished: Path | None = None, ground: Ground | None = None,
    previous: Previous | None = None, earlier: Earlier | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write `labels.parquet` (a row for every feature) and add to `attempts.jsonl`, in `folder`.

    Every answer is kept in the cache of completions as soon as it comes, so a killed run, or the same labels made
    again elsewhere, asks for nothing twice.

    Args:
        settings: who writes the labels, and for how many features (see `choose_features`).
        features: folder of the finished features.
        folder: where to write.
        report: progress, in bytes while a local model is fetched, then in labels.
        api_key: the endpoint's key; default: OPENAI_API_KEY from the environment. It is kept nowhere.
        only: features to ask about, in place of those that the settings choose; with `finished`.
        finished: folder of finished labels, from which the rows of all other features are taken.
        ground: what labels are scored with and found by; without it neither is done, and no contrast is shown.
        previous: the generation before, whose labels of kept features are taken over: scored again, and asked for
            again only when one that beat its control does so no longer.
        earlier: labels of the same features, whose labelers' tables are kept (see `labelers`).

    Returns:
        Numbers of features by status, the share `labeled` of those to be asked about and `failed` of those that were,
        tokens, `dollars` (None where the price is not known), the share `spent` of the budget, why it was `stopped`
        when that was used up, seconds a label in this run, and the first ten written labels with an example each;
        the shares of written labels that were `scored`, and of these that are better than the control, and for each
        scorer all scores with the controls'.

    Raises:
        LabelError: there is no label writer, it refuses the key, it does not know the model, or it stopped answering;
            a feature in `only` is not there or dead; there is a limit in dollars, but no price.
        ModelError, CatalogError: the sentence-embedding model cannot be loaded, or not be found.
        ArtifactError: the disk is full.
    """
    source = Features.open(features)
    chosen = choose(source, settings, only)
    if earlier:
        keep_earlier(earlier, folder)
    if finished:
        _copy_attempts(finished, folder)
    start = time.monotonic()
    outcomes: list[Outcome] = []
    others = Labels.open(finished).rows() if finished else []
    carried = carry_over(previous, source) if previous and chosen else []
    scored = Scored({}, "")
    summary: dict[str, Any] = {"stopped": "", "spent": 0.0}
    if chosen:
        key = api_key or os.environ.get("OPENAI_API_KEY") or "none"  # many servers want none; one that does says so
        with recorder(folder / ATTEMPTS) as record, label_writer(settings, key, report) as client:
            labeler = Labeler(client, source, settings, record, _texts(settings, source, ground, report))
            at_once = settings.concurrency if settings.base_url else 1
            for row in carried:
                record({"feature": row.feature, "carried": row.label, "made_at": row.made_at})
            held = held_before(previous, carried) if previous else set()
            outcomes, scored = asyncio.run(_ask(labeler, chosen, at_once, report, ground, others, carried, held))
            summary = {"stopped": scored.stopped, "spent": client.budget.share}
    summary["seconds_per_label"] = round((time.monotonic() - start) / len(outcomes), 3) if outcomes else 0.0
    rows = _rows(source.table(), settings, {outcome.feature: outcome for outcome in outcomes}, carried)
    rows = [replace(row, **scored.fields.get(row.feature, {})) for row in rows]
    if finished:
        rows = _merged(others, rows, {outcome.feature for outcome in outcomes})
    with write_atomically(folder / LABELS) as path:
        table = pa.Table.from_pylist([asdict(row) for row in rows], SCHEMA)
        pq.write_table(table, path, row_group_size=ROW_GROUP)
    if ground:
        from sae_core.labels.meaning import write_meaning

        write_meaning(ground.model, source, rows, folder)
    return _summary(source, settings, rows) | summary | {"n_carried": len(carried)}


def _texts(settings: LabelSettings, source: Features, ground: Ground | None, report: Report) -> "Texts | None":
    """The sample of the corpus, where it is searched: for contrast or for scores."""
    if ground is None or not (settings.contrast or settings.scorers):
        return None
    from sae_core.labels.scoring.nearest import Texts

    return Texts(settings.embedder, source, report)


def choose_features(table: pa.Table, count: int) -> list[int]:
    """The `count` live features most worth a label, in the order in which they are asked about.

    First those that fired at least `MIN_FIRED` times and on at most `MAX_DENSITY` of the tokens, strongest first;
    then the other live ones, likewise. Strong is a high mean over firings: a maximum may be one odd token's, on which
    hundreds of features have theirs. Ties go to the lower number.
    """
    n_fired, density, mean_act = (table[name].to_numpy() for name in ("n_fired", "density", "mean_act"))
    is_odd = (n_fired < MIN_FIRED) | (density > MAX_DENSITY)
    order = np.lexsort((-mean_act, is_odd))
    return [int(i) for i in order[n_fired[order] > 0][:count]]


def choose(source: Features, settings: LabelSettings, only: Sequence[int]) -> list[int]:
    """The features that a person named, each once; else those that the settings choose.

    Raises LabelError when a named one is not there, or never fires.
    """
    if not only:
        return choose_features(source.table(), settings.features)
    n_fired = source.table()["n_fired"].to_numpy()
    for feature in only:
        if not 0 <= feature < len(n_fired):
            raise LabelError(f"there is no feature {feature}: this dictionary has features 0 to {len(n_fired) - 1}")
        if not n_fired[feature]:
            raise LabelError(f"feature {feature} never fires: there is nothing to name it by")
    return list(dict.fromkeys(only))


def _merged(finished: Sequence[LabelRow], rows: Sequence[LabelRow], asked: set[int]) -> list[LabelRow]:
    """The finished rows, with the new ones of the features asked about; a label is not given up for a failure."""
    pairs = zip(finished, rows, strict=True)
    return [
        new if new.feature in asked and (new.status == "written" or old.status != "written") else old
        for old, new in pairs
    ]


def _copy_attempts(finished: Path, folder: Path) -> None:
    """Begin the record of attempts with the finished one's, unless a killed run did."""
    if (finished / ATTEMPTS).is_file() and not (folder / ATTEMPTS).exists():
        with write_atomically(folder / ATTEMPTS) as path:
            shutil.copyfile(finished / ATTEMPTS, path)


async def _ask(
    labeler: Labeler, chosen: Sequence[int], at_once: int, report: Report, ground: Ground | None,
    others: Sequence[LabelRow], carried: Sequence[LabelRow], held: set[int],
) -> tuple[list[Outcome], Scored]:  # fmt: skip
    """What came of asking about those that no label was carried over to, and how good all these labels are.

    A carried one that `held` and does so no longer is asked for again.
    """
    has_name = {row.feature for row in carried}

    async def ask(features: Sequence[int], rows: Sequence[LabelRow]) -> tuple[list[Outcome], Scored]:
        outcomes = await labeler.label_all(features, at_once, report)
        stopped = labeler.stopped
        written = [*asked_all(outcomes, labeler.features, labeler.settings), *rows]
        scored = await _score(labeler, written, [*others, *carried], at_once, report, ground)
        return outcomes, scored._replace(stopped=stopped or scored.stopped)

    try:
        outcomes, scored = await ask([feature for feature in chosen if feature not in has_name], carried)
        lost = [i for i in sorted(held) if scored.fields.get(i, {}).get("beats_control") is False]
        if lost and not scored.stopped:
            again, more = await ask(lost, [])
            written = [outcome for outcome in again if outcome.answer]
            return [*outcomes, *written], Scored(scored.fields | more.fields, more.stopped)
        return outcomes, scored
    finally:
        await labeler.client.close()


async def _score(
    labeler: Labeler, rows: Sequence[LabelRow], others: Sequence[LabelRow], at_once: int, report: Report,
    ground: Ground | None,
) -> Scored:  # fmt: skip
    if ground is None or not labeler.settings.scorers:
        return Scored({}, "")
    from sae_core.labels.scoring.score import score_labels  # brings torch

    client, source, settings, record = labeler.client, labeler.features, labeler.settings, labeler.record
    return await score_labels(
        client, rows, others, source, settings, ground.neighbors, record, at_once, report, labeler.texts
    )


def asked_all(outcomes: Sequence[Outcome], source: Features, settings: LabelSettings) -> list[LabelRow]:
    """The rows of the features that were asked about."""
    names = [lexical_label(source.feature(outcome.feature)) for outcome in outcomes]
    return [_asked(outcome, name, settings) for outcome, name in zip(outcomes, names, strict=True)]


def _rows(
    table: pa.Table, settings: LabelSettings, outcomes: Mapping[int, Outcome], carried: Sequence[LabelRow]
) -> list[LabelRow]:
    """A row for every feature, in order: what was written now, else what was carried over, else the lexical label."""
    rows, named = [], {row.feature: row for row in carried}
    for batch in table.to_batches(max_chunksize=4096):
        for feature in (FeatureRow(**row) for row in batch.to_pylist()):
            lexical = lexical_label(feature)
            if outcome := outcomes.get(feature.feature):
                rows.append(_asked(outcome, lexical, settings))
            elif feature.feature in named:
                rows.append(named[feature.feature])
            else:
                rows.append(LabelRow(feature.feature, lexical, "dead" if feature.is_dead else "lexical"))
    return rows


def _asked(outcome: Outcome, lexical: str, settings: LabelSettings) -> LabelRow:
    """The row of a feature that was asked about."""
    written = outcome.answer._asdict() if outcome.answer else {}
    return LabelRow(
        outcome.feature, lexical, "written" if outcome.answer else "failed", **written,
        model=settings.model, prompt_version=prompts.VERSION, seed=settings.seed, prompt_tokens=outcome.prompt_tokens,
        completion_tokens=outcome.completion_tokens, dollars=outcome.dollars, seconds=outcome.seconds,
        made_at=outcome.made_at, examples=tuple(outcome.examples), error=outcome.error,
    )  # fmt: skip


def _summary(source: Features, settings: LabelSettings, rows: Sequence[LabelRow]) -> dict[str, Any]:
    """What the table holds, whoever asked for it and whenever."""
    status = Counter(row.status for row in rows)
    order = choose_features(source.table(), len(rows))
    written = [rows[i] for i in order if rows[i].status == "written"]
    wanted = {*order[: settings.features], *(row.feature for row in rows if row.status in ("written", "failed"))}
    costs = [row.dollars for row in rows]
    return {
        "model": settings.model,
        "prompt_version": prompts.VERSION,
        "n_labeled": status["written"],
        "n_failed": status["failed"],
        "n_lexical": status["lexical"],
        "n_dead": status["dead"],
        "labeled": status["written"] / len(wanted) if wanted else 1.0,
        "failed": status["failed"] / max(status["written"] + status["failed"], 1),
        "prompt_tokens": sum(row.prompt_tokens for row in rows),
        "completion_tokens": sum(row.completion_tokens for row in rows),
        "dollars": None if None in costs else sum(cost or 0.0 for cost in costs),
        "examples": [
            {
                "feature": row.feature,
                "label": row.label,
                "description": row.description,
                "example": _shown(source, row),
                "beats_control": row.beats_control,
            }
            for row in written[:_SHOWN]
        ],
    } | _score_summary(written)


def _score_summary(written: Sequence[LabelRow]) -> dict[str, Any]:
    """How many labels were scored, how many of these beat the control, and every score beside the controls'."""
    scored = [row for row in written if row.scores]
    compared = [row.beats_control for row in scored if row.beats_control is not None]
    scores: dict[str, dict[str, list[float | None]]] = {}
    for score in (score for row in scored for score in row.scores):
        found = scores.setdefault(score.scorer, {"score": [], "shuffled": [], "lexical": []})
        for name, values in found.items():
            values.append(getattr(score, name))
    return {
        "scored": len(scored) / len(written) if written else 1.0,
        "beats_control": sum(compared) / len(compared) if compared else 1.0,
        "scores": scores,
    }


def _shown(source: Features, row: LabelRow) -> str:
    """The strongest example that the label writer saw, as it saw it."""
    return prompts.mark(source.examples(row.feature)[row.examples[0]]) if row.examples else ""
