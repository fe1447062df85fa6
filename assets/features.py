"""Features: how often each fires, on what text, and which tokens it promotes."""

from typing import Any

import dagster as dg

from assets.activations import activations
from assets.checks import specs
from assets.corpus import corpus
from assets.dictionary import dictionary
from assets.partitions import corpus_of_dictionary, dictionaries, site_of_dictionary
from assets.plots import sparkline
from assets.resources import Workshop, launchpad
from sae_core.artifacts import Made
from sae_core.stages import VERSIONS
from sae_core.study import FeatureSettings

FeaturesRun = launchpad(FeatureSettings)


@dg.asset(
    partitions_def=dictionaries,
    deps=[
        dictionary,
        dg.AssetDep(activations, partition_mapping=site_of_dictionary),
        dg.AssetDep(corpus, partition_mapping=corpus_of_dictionary),
    ],
    group_name="features",
    kinds={"parquet"},
    code_version=str(VERSIONS["features"]),
    check_specs=specs("features"),
)
def features(context: dg.AssetExecutionContext, config: FeaturesRun, workshop: Workshop) -> dg.MaterializeResult:
    """Firing statistics, examples over activation levels with their context, promoted and suppressed tokens."""
    from sae_core.features import build_features

    return workshop.make(
        context, "features", config,
        lambda order, draft, report: build_features(
            order.study.features, order.study.model, draft.parents["corpus"].folder,
            draft.parents["activations"].folder, draft.parents["dictionary"].folder, draft.folder,
            workshop.torch_device(), report,
        ),
        _density,
    )  # fmt: skip


def _density(made: Made) -> dict[str, Any]:
    histogram = made.manifest.summary["density_histogram"]
    edges = histogram["log10_edges"]
    title = f"features by log10 density, {edges[0]:.1f} to {edges[-1]:.1f}"
    return {"density_histogram": sparkline(histogram["features"], title)}
