"""The stage `steering_report`."""

import asyncio
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sae_core.artifacts import write_atomically
from sae_core.corpus import Corpus
from sae_core.labels.asker import ask_all, recorder
from sae_core.labels.endpoint import label_writer
from sae_core.labels.scoring.embedding import Embedder
from sae_core.progress import Report, silent
from sae_core.steering_levers import levers
from sae_core.steering_report.choosing import CHOICES, CHOICES_SCHEMA, Choice, choose
from sae_core.steering_report.judge import PARAMETERS, Grades, read_grades
from sae_core.steering_report.measuring import Case, measure, rows
from sae_core.steering_report.rows import REPORT, SCHEMA, Row, expected_to_rise, raised
from sae_core.steering_report.writing import markdown
from sae_core.steering_texts import Subject
from sae_core.study import LabelSettings, Packing, SteeringReportSettings

LEVERS, MARKDOWN, GRADES = "levers.parquet", "report.md", "grades.jsonl"
_LEVERS_SCHEMA = pa.schema(
    [
        ("feature", pa.int32()), ("change", pa.string()), ("rise", pa.float32()), ("low", pa.float32()),
        ("high", pa.float32()), ("n_windows", pa.int32()),
    ]
)  # fmt: skip


class Made(NamedTuple):
    """Folders of what the report is made from, besides the model and the dictionary."""

    scores: Path
    """Of the stage `steering`."""
    labels: Path
    corpus: Path
    """Its words say which are rare, its held-out text is for the levers test."""


def build_steering_report(
    settings: SteeringReportSettings, subject: Subject, made: Made, packing: Packing, judge: LabelSettings,
    api_key: str | None, folder: Path, report: Report = silent,
) -> dict[str, Any]:  # fmt: skip
    """Write `steering_report.parquet` (columns as in `Row`), `choices.parquet`, `levers.parquet` and `report.md`.

    Where labels are judged by a language model, so are the texts: its answers are in `grades.jsonl`.

    Args:
        settings: how much is measured.
        subject: the model and the dictionary.
        made: what else is read.
        packing: whether attention restarts at each document of the corpus.
        judge: who judges labels, and with what budget; and what says how near a text is to a label.
        api_key: the judge's key; default: OPENAI_API_KEY from the environment. It is kept nowhere.
        folder: where to write.
        report: progress, in candidates, texts, features and judged texts.

    Returns:
        Features looked at and measured; how many say their words tenfold within the perplexity bound, and how many are
        expected to; mean concept rates of all conditions; texts `judged`, those of them whose answers `failed`, and why
        the judge `stopped`, if the budget was used up.

    Raises:
        LabelError: a judge is configured that cannot be asked.
        ModelError, CatalogError: the sentence-embedding model cannot be loaded, or not be found.
    """
    text = Corpus.open(made.corpus).train.token_ids
    choices = choose(subject, made.scores, made.labels, subject.word_rates(text), settings, report)
    chosen = [choice for choice in choices if choice.chosen]
    embedder = Embedder(judge.embedder, report) if chosen else None
    cases = measure(subject, chosen, embedder, settings, report) if embedder else []
    graded, stopped = _graded(cases, judge, len(chosen), api_key, folder, report)
    told = [*rows(subject, cases, embedder, graded)] if embedder else []
    features = [choice.candidate.feature for choice in chosen]
    held = (made.corpus, packing, settings.lever_tokens, settings.seed, report)
    pulled = levers(subject, features, *held) if features else []
    summary = _summary(settings, choices, told, graded) | {"stopped": stopped}
    _write([choice.row() for choice in choices], CHOICES_SCHEMA, folder / CHOICES)
    _write([row._asdict() for row in told], SCHEMA, folder / REPORT)
    _write([lever._asdict() for lever in pulled], _LEVERS_SCHEMA, folder / LEVERS)
    with write_atomically(folder / MARKDOWN) as path:
        path.write_text(markdown(choices, told, pulled, settings, summary), "utf-8")
    return summary


def _graded(
    cases: Sequence[Case], judge: LabelSettings, n_features: int, api_key: str | None, folder: Path, report: Report
) -> tuple[list[list[Grades | None]], str]:
    """What the judge says of the texts of each case, of as many features as the study lets it judge labels."""
    judged = {*list(dict.fromkeys(case.candidate.feature for case in cases))[: judge.judged_of(n_features)]}
    if not judged:
        return [[] for _ in cases], ""
    asked = [case.questions() if case.candidate.feature in judged else [] for case in cases]
    key = api_key or os.environ.get("OPENAI_API_KEY") or "none"
    with recorder(folder / GRADES) as record, label_writer(judge, key, report) as client:
        questions = [question for some in asked for question in some]
        at_once = judge.concurrency if judge.base_url else 1
        found, stopped = asyncio.run(ask_all(client, questions, read_grades, at_once, record, report, **PARAMETERS))
    ends = np.cumsum([len(some) for some in asked]).tolist()
    return [found[end - len(some) : end] for end, some in zip(ends, asked, strict=True)], stopped


def _summary(
    settings: SteeringReportSettings, choices: Sequence[Choice], told: Sequence[Row],
    graded: Sequence[Sequence[Grades | None]],
) -> dict[str, Any]:  # fmt: skip
    most, answers = settings.perplexity_ratio_max, [grades for some in graded for grades in some]
    kinds = sorted({row.condition for row in told})
    means = {f"rate_{kind}": float(np.mean([r.concept_rate for r in told if r.condition == kind])) for kind in kinds}
    return {
        "n_candidates": len({choice.candidate.feature for choice in choices}),
        "n_features": len({row.feature for row in told}),
        "n_raised": len(raised(told, most)),
        "n_expected": len(expected_to_rise(told, most)),
        "judged": len(answers),
        "failed": sum(grades is None for grades in answers),
        **means,
    }


def _write(table: Sequence[dict[str, Any]], schema: pa.Schema, path: Path) -> None:
    with write_atomically(path) as temporary:
        pq.write_table(pa.Table.from_pylist(list(table), schema), temporary)
