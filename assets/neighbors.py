"""Neighbors: for each feature, those whose decoder rows point the same way."""

import dagster as dg

from assets.checks import specs
from assets.dictionary import dictionary
from assets.partitions import dictionaries
from assets.resources import Workshop, launchpad
from sae_core.stages import VERSIONS
from sae_core.study import NeighborSettings

NeighborsRun = launchpad(NeighborSettings)


@dg.asset(
    partitions_def=dictionaries,
    deps=[dictionary],
    group_name="atlas",
    kinds={"faiss", "parquet"},
    code_version=str(VERSIONS["neighbors"]),
    check_specs=specs("neighbors"),
)
def neighbors(context: dg.AssetExecutionContext, config: NeighborsRun, workshop: Workshop) -> dg.MaterializeResult:
    """A FAISS index over unit decoder rows, the nearest features of each, and the index's measured recall."""
    from sae_core.neighbors import build_neighbors

    return workshop.make(
        context, "neighbors", config,
        lambda order, draft, report: build_neighbors(
            order.study.neighbors, draft.parents["dictionary"].folder, draft.folder, report
        ),
    )  # fmt: skip
