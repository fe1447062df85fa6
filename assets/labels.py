"""Labels: a short name for each feature, written by a language model or read off its tokens."""

from typing import TYPE_CHECKING, Any

import dagster as dg
from pydantic import Field

from assets.checks import specs
from assets.features import features
from assets.neighbors import neighbors
from assets.partitions import dictionaries
from assets.plots import score_histograms
from assets.resources import Workshop, launchpad
from sae_core.artifacts import Draft, Made
from sae_core.generations import Snapshot, served
from sae_core.progress import Report
from sae_core.stages import VERSIONS
from sae_core.studies import Order
from sae_core.study import LabelSettings

if TYPE_CHECKING:
    from sae_core.labels.carry import Previous
    from sae_core.labels.labelers import Earlier

PASSING = dg.RetryPolicy(max_retries=3, delay=30, backoff=dg.Backoff.EXPONENTIAL, jitter=dg.Jitter.PLUS_MINUS)
"""For a server that stops answering midway: again after about 30, 90 and 210 seconds. What was answered is kept."""


_ASKED_WITH = (
    "model",
    "base_url",
    "examples",
    "contrast",
    "temperature",
    "seed",
)  # what decides which label is written


class LabelsRun(launchpad(LabelSettings)):  # type: ignore[misc]
    """The settings, and features to label beside those that are labeled."""

    only: list[int] = Field(
        [], description="Features by number: only these are asked about, and the other rows stay as they are."
    )


@dg.asset(
    partitions_def=dictionaries,
    deps=[features, neighbors],
    group_name="labels",
    kinds={"openai", "parquet"},
    code_version=str(VERSIONS["labels"]),
    check_specs=specs("labels"),
    retry_policy=PASSING,
)
def labels(context: dg.AssetExecutionContext, config: LabelsRun, workshop: Workshop) -> dg.MaterializeResult:
    """Labels through any OpenAI-compatible endpoint, or a local llama.cpp server; a lexical label for every feature."""
    from sae_core.labels import build_labels
    from sae_core.labels.build import Ground

    def build(order: Order, draft: Draft, report: Report) -> dict[str, Any]:
        features, key = draft.parents["features"].folder, workshop.api_key or None
        finished = workshop.finished(draft) if config.only else None
        ground = Ground(order.study.model, draft.parents["neighbors"].folder)
        previous = None if config.only else _previous(workshop, draft)
        return build_labels(
            order.study.labels, features, draft.folder, report, key, config.only, finished, ground, previous,
            _earlier(workshop, draft, order.study.labels.model),
        )  # fmt: skip

    return workshop.make(context, "labels", config, build, _describe)


def _earlier(workshop: Workshop, draft: Draft, model: str) -> "Earlier | None":
    """The labels that these take the place of, when they are of the same features."""
    from sae_core.labels.labelers import Earlier, labeler_name
    from sae_core.labels.prompts import VERSION

    slug = draft.recipe.slug
    now, parent = workshop.store.manifest("labels", slug), draft.parents["features"].manifest
    if now is None or now.folder == draft.folder.name or now.parents.get(parent.key) != parent.fingerprint:
        return None
    before, asked = ({key: of.get(key) for key in _ASKED_WITH} for of in (now.settings, draft.recipe.settings))
    by = labeler_name(now.summary["model"], before, now.summary["prompt_version"])
    return Earlier(workshop.store.get("labels", slug).folder, by, labeler_name(model, asked, VERSION))


def _previous(workshop: Workshop, draft: Draft) -> "Previous | None":
    """The served generation, when this dictionary came right after it and labels were asked for in the same way."""
    from sae_core.labels.carry import Previous
    from sae_core.lineage import kept_since

    slug, now = draft.recipe.slug, served(workshop.store, draft.recipe.slug)
    if not isinstance(now, Snapshot):
        return None
    labels, asked = now.get("labels", slug), draft.recipe.settings
    if any(labels.manifest.settings.get(key) != asked[key] for key in _ASKED_WITH):
        return None
    kept = kept_since(now.get("dictionary", slug).folder, workshop.store.get("dictionary", slug).folder)
    return Previous(labels.folder, now.get("features", slug).folder, kept)


def _describe(made: Made) -> dict[str, Any]:
    summary = made.manifest.summary
    rows = [{key: str(value) for key, value in row.items()} for row in summary["examples"]]
    examples = {"examples": dg.MetadataValue.table([dg.TableRecord(row) for row in rows])} if rows else {}
    pictures = score_histograms(summary["scores"])
    return (
        pictures
        | examples
        | ({"dollars": "unknown: no table has this model's price"} if summary["dollars"] is None else {})
    )
