"""Steering: which features steer, how strongly one should, and what comes of it."""

from typing import Any

import dagster as dg

from assets.activations import activations
from assets.checks import specs
from assets.corpus import corpus
from assets.dictionary import dictionary
from assets.features import features
from assets.partitions import corpus_of_dictionary, dictionaries, site_of_dictionary
from assets.resources import Workshop, launchpad
from sae_core.artifacts import Made
from sae_core.stages import ON_DEMAND, VERSIONS
from sae_core.study import SteeringReportSettings, SteeringSettings

SteeringRun = launchpad(SteeringSettings)
SteeringReportRun = launchpad(SteeringReportSettings)
_READ: list[dg.AssetsDefinition | dg.AssetDep] = [
    dictionary,
    features,
    dg.AssetDep(activations, partition_mapping=site_of_dictionary),
]


@dg.asset(
    partitions_def=dictionaries,
    deps=_READ,
    group_name="steering",
    kinds={"pytorch", "parquet"},
    code_version=str(VERSIONS["steering"]),
    check_specs=specs("steering"),
)
def steering(context: dg.AssetExecutionContext, config: SteeringRun, workshop: Workshop) -> dg.MaterializeResult:
    """An output score for every live feature, and a suggested strength for those with the best."""
    from sae_core.atlas import sink_norm
    from sae_core.steering_scores import build_steering

    return workshop.make(
        context, "steering", config,
        lambda order, draft, report: build_steering(
            order.study.steering, order.study.model, order.study.site, sink_norm(draft.parents["activations"]),
            draft.parents["dictionary"].folder, draft.parents["features"].folder, draft.folder,
            workshop.torch_device(), report,
        ),
    )  # fmt: skip


@dg.asset(
    partitions_def=dictionaries,
    deps=[*_READ, dg.AssetDep(corpus, partition_mapping=corpus_of_dictionary), steering],
    group_name="reports",
    kinds={"pytorch", "parquet", "markdown"},
    code_version=str(ON_DEMAND["steering_report"]),
    check_specs=specs("steering_report"),
)
def steering_report(
    context: dg.AssetExecutionContext, config: SteeringReportRun, workshop: Workshop
) -> dg.MaterializeResult:
    """Texts under steering and under its controls, measured: concept rate, perplexity, repetition."""
    from sae_core.atlas import sink_norm
    from sae_core.steering_report import build_steering_report

    return workshop.make(
        context, "steering_report", config,
        lambda order, draft, report: build_steering_report(
            order.study.steering_report, order.study.model, order.study.site,
            sink_norm(draft.parents["activations"]), draft.parents["dictionary"].folder,
            draft.parents["features"].folder, draft.parents["steering"].folder, draft.parents["corpus"].folder,
            order.study.activations.packing, draft.folder,
            workshop.torch_device(), report,
        ),
        _report,
    )  # fmt: skip


def _report(made: Made) -> dict[str, Any]:
    return {"report": dg.MetadataValue.md((made.folder / "report.md").read_text("utf-8"))}
