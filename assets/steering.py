"""Steering: which features steer, how strongly one should, and what comes of it."""

from typing import Any

import dagster as dg

from assets.activations import activations
from assets.corpus import corpus
from assets.dictionary import dictionary
from assets.features import features
from assets.partitions import corpus_of_dictionary, site_of_dictionary
from assets.per_dictionary import REPORTS, Task, markdown, per_dictionary
from sae_core.study import SteeringReportSettings, SteeringSettings

_READ: list[dg.AssetsDefinition | dg.AssetDep] = [
    dictionary,
    features,
    dg.AssetDep(activations, partition_mapping=site_of_dictionary),
]


@per_dictionary(SteeringSettings, _READ, "steering", {"pytorch", "parquet"})
def steering(task: Task) -> dict[str, Any]:
    """An output score for every live feature, and a suggested strength for those with the best."""
    from sae_core.atlas import sink_norm
    from sae_core.steering_scores import build_steering

    study, parents = task.study, task.draft.parents
    return build_steering(
        study.steering, study.model, study.site, sink_norm(parents["activations"]), parents["dictionary"].folder,
        parents["features"].folder, task.draft.folder, task.workshop.torch_device(), task.report,
    )  # fmt: skip


@per_dictionary(
    SteeringReportSettings,
    [*_READ, dg.AssetDep(corpus, partition_mapping=corpus_of_dictionary), steering],
    REPORTS,
    {"pytorch", "parquet", "markdown"},
    markdown,
)
def steering_report(task: Task) -> dict[str, Any]:
    """Texts under steering and under its controls, measured: concept rate, perplexity, repetition."""
    from sae_core.atlas import sink_norm
    from sae_core.steering_report import build_steering_report

    study, parents = task.study, task.draft.parents
    return build_steering_report(
        study.steering_report, study.model, study.site, sink_norm(parents["activations"]),
        parents["dictionary"].folder, parents["features"].folder, parents["steering"].folder,
        parents["corpus"].folder, study.activations.packing, task.draft.folder, task.workshop.torch_device(),
        task.report,
    )  # fmt: skip
