"""Labels: a short name for each feature, written by a language model or read off its tokens."""

from typing import Any

import dagster as dg

from assets.checks import specs
from assets.features import features
from assets.partitions import dictionaries
from assets.resources import Workshop, launchpad
from sae_core.artifacts import Made
from sae_core.stages import VERSIONS
from sae_core.study import LabelSettings

LabelsRun = launchpad(LabelSettings)


@dg.asset(
    partitions_def=dictionaries,
    deps=[features],
    group_name="labels",
    kinds={"openai", "parquet"},
    code_version=str(VERSIONS["labels"]),
    check_specs=specs("labels"),
)
def labels(context: dg.AssetExecutionContext, config: LabelsRun, workshop: Workshop) -> dg.MaterializeResult:
    """Labels through any OpenAI-compatible endpoint, or a local llama.cpp server; a lexical label for every feature."""
    from sae_core.labels import build_labels

    return workshop.make(
        context, "labels", config,
        lambda order, draft, report: build_labels(
            order.study.labels, draft.parents["features"].folder, draft.folder, report
        ),
        _examples,
    )  # fmt: skip


def _examples(made: Made) -> dict[str, Any]:
    rows = [{key: str(value) for key, value in row.items()} for row in made.manifest.summary["examples"]]
    return {"examples": dg.MetadataValue.table([dg.TableRecord(row) for row in rows])} if rows else {}
