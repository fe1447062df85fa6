"""The labels stage: which features are asked about, and the table that comes of it."""

import asyncio
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sae_core.artifacts import write_atomically
from sae_core.features import FeatureRow, Features
from sae_core.labels import prompts
from sae_core.labels.client import ChatClient
from sae_core.labels.endpoint import label_writer
from sae_core.labels.labeler import Labeler, Outcome, Record
from sae_core.labels.lexical import lexical_label
from sae_core.labels.reader import ATTEMPTS, LABELS, SCHEMA, LabelRow
from sae_core.progress import Report, silent
from sae_core.study import LabelSettings

CONCURRENCY = 8
"""Requests under way at once at an endpoint; a local server takes one at a time."""
MIN_FIRED = 20
"""Features that fired less often are asked about last: too few examples to judge by."""
MAX_DENSITY = 0.01
"""Features that fire on a larger share of the tokens are asked about last: they are punctuation, or no one thing."""
_SHOWN = 10  # labels in the summary


def build_labels(
    settings: LabelSettings, features: Path, folder: Path, report: Report = silent, api_key: str | None = None,
    concurrency: int = CONCURRENCY,
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
        concurrency: requests under way at once at an endpoint.

    Returns:
        Numbers of features by status, the share `labeled` of those asked about, tokens, seconds a label in this run,
        and the first ten written labels with an example each.

    Raises:
        LabelError: there is no label writer, it refuses the key, it does not know the model, or it stopped answering.
        ArtifactError: the disk is full.
    """
    source = Features.open(features)
    chosen = choose_features(source.table(), settings.features)
    start = time.monotonic()
    outcomes: list[Outcome] = []
    if chosen:
        key = api_key or os.environ.get("OPENAI_API_KEY") or "none"  # many servers want none; one that does says so
        at_once = concurrency if settings.base_url else 1
        with _recorder(folder / ATTEMPTS) as record, label_writer(settings, key, report) as client:
            outcomes = asyncio.run(_ask(client, source, settings, record, chosen, at_once, report))
    seconds = time.monotonic() - start
    rows = _rows(source.table(), settings, {outcome.feature: outcome for outcome in outcomes})
    with write_atomically(folder / LABELS) as path:
        pq.write_table(pa.Table.from_pylist([asdict(row) for row in rows], SCHEMA), path)
    return _summary(settings, rows, outcomes, seconds)


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


async def _ask(
    client: ChatClient, source: Features, settings: LabelSettings, record: Record, chosen: Sequence[int],
    at_once: int, report: Report,
) -> list[Outcome]:  # fmt: skip
    try:
        return await Labeler(client, source, settings, record).label_all(chosen, at_once, report)
    finally:
        await client.close()


@contextmanager
def _recorder(path: Path) -> Iterator[Record]:
    """Add lines to the record of attempts; a line that a killed run left half written is dropped first."""
    with path.open("a+b") as file:
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)

        def record(attempt: dict[str, Any]) -> None:
            file.write(json.dumps(attempt, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
            file.flush()

        yield record


def _rows(table: pa.Table, settings: LabelSettings, outcomes: Mapping[int, Outcome]) -> list[LabelRow]:
    """A row for every feature, in order."""
    rows = []
    for batch in table.to_batches(max_chunksize=4096):
        for feature in (FeatureRow(**row) for row in batch.to_pylist()):
            lexical = lexical_label(feature)
            if outcome := outcomes.get(feature.feature):
                rows.append(_asked(outcome, lexical, settings))
            else:
                rows.append(LabelRow(feature.feature, lexical, "dead" if feature.is_dead else "lexical"))
    return rows


def _asked(outcome: Outcome, lexical: str, settings: LabelSettings) -> LabelRow:
    """The row of a feature that was asked about."""
    written = outcome.answer._asdict() if outcome.answer else {}
    return LabelRow(
        outcome.feature, lexical, "written" if outcome.answer else "failed", **written,
        model=settings.model, prompt_version=prompts.VERSION, prompt_tokens=outcome.prompt_tokens,
        completion_tokens=outcome.completion_tokens, examples=tuple(outcome.examples), error=outcome.error,
    )  # fmt: skip


def _summary(
    settings: LabelSettings, rows: Sequence[LabelRow], outcomes: Sequence[Outcome], seconds: float
) -> dict[str, Any]:
    written = [outcome for outcome in outcomes if outcome.answer]
    return {
        "model": settings.model,
        "prompt_version": prompts.VERSION,
        "n_labeled": len(written),
        "n_failed": len(outcomes) - len(written),
        "n_lexical": sum(row.status == "lexical" for row in rows),
        "n_dead": sum(row.status == "dead" for row in rows),
        "labeled": len(written) / len(outcomes) if outcomes else 1.0,
        "prompt_tokens": sum(outcome.prompt_tokens for outcome in outcomes),
        "completion_tokens": sum(outcome.completion_tokens for outcome in outcomes),
        "seconds_per_label": round(seconds / len(outcomes), 3) if outcomes else 0.0,
        "examples": [
            {"feature": o.feature, "label": o.answer.label, "description": o.answer.description, "example": o.shown}
            for o in written[:_SHOWN]
            if o.answer
        ],
    }
