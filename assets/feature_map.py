"""Feature map: a picture of all features in the plane, and their clusters."""

import dagster as dg

from assets.checks import specs
from assets.dictionary import dictionary
from assets.partitions import dictionaries
from assets.plots import scatter
from assets.resources import Workshop, launchpad
from sae_core.stages import VERSIONS
from sae_core.study import FeatureMapSettings

FeatureMapRun = launchpad(FeatureMapSettings)


@dg.asset(
    partitions_def=dictionaries,
    deps=[dictionary],
    group_name="atlas",
    kinds={"parquet"},
    code_version=str(VERSIONS["feature_map"]),
    check_specs=specs("feature_map"),
)
def feature_map(context: dg.AssetExecutionContext, config: FeatureMapRun, workshop: Workshop) -> dg.MaterializeResult:
    """UMAP of the decoder rows, and HDBSCAN clusters: nearby features mean similar things."""
    from sae_core.feature_map import build_feature_map

    return workshop.make(
        context, "feature_map", config,
        lambda order, draft, report: build_feature_map(
            order.study.feature_map, draft.parents["dictionary"].folder, draft.folder, report
        ),
        lambda made: {"map": scatter(made.folder / "map.parquet")},
    )  # fmt: skip
