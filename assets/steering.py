"""Steering: which features steer, how strongly one should, and what comes of it."""

from typing import Any

import dagster as dg

from assets.activations import activations
from assets.corpus import corpus
from assets.dictionary import dictionary
from assets.features import features
from assets.labels import labels
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
    from sae_core.steering_scores import build_steering

    return build_steering(task.study.steering, task.subject(), task.draft.folder, task.report)


@per_dictionary(
    SteeringReportSettings,
    [*_READ, dg.AssetDep(corpus, partition_mapping=corpus_of_dictionary), steering, labels],
    REPORTS,
    {"pytorch", "openai", "parquet", "markdown"},
    markdown,
)
def steering_report(task: Task) -> dict[str, Any]:
    """Texts under steering and its controls: their words, their nearness to the label, a judge's grades, fluency."""
    from sae_core.steering_report import Made, build_steering_report

    study, parents = task.study, task.draft.parents
    made = Made(*(parents[stage].folder for stage in ("steering", "labels", "corpus")))
    return build_steering_report(
        study.steering_report, task.subject(), made, study.activations.packing, study.labels,
        task.workshop.api_key or None, task.draft.folder, task.report,
    )  # fmt: skip
