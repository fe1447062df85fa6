"""Atlas: all finished stages of a dictionary together, served from now on if they are no worse than before."""

from typing import Any

import dagster as dg

from assets.activations import activations
from assets.checks import specs
from assets.corpus import corpus
from assets.dictionary import dictionary
from assets.feature_map import feature_map
from assets.features import features
from assets.labels import labels
from assets.neighbors import neighbors
from assets.partitions import corpus_of_dictionary, dictionaries, sites_of_dictionary
from assets.resources import Workshop, launchpad
from assets.steering import steering
from sae_core.artifacts import Made
from sae_core.stages import VERSIONS
from sae_core.study import RetrainingSettings

AtlasRun = launchpad(RetrainingSettings)


@dg.asset(
    partitions_def=dictionaries,
    deps=[
        dg.AssetDep(corpus, partition_mapping=corpus_of_dictionary),
        dg.AssetDep(activations, partition_mapping=sites_of_dictionary),
        dictionary,
        features,
        neighbors,
        feature_map,
        steering,
        labels,
    ],
    group_name="atlas",
    kinds={"parquet"},
    code_version=str(VERSIONS["atlas"]),
    check_specs=specs("atlas"),
)
def atlas(context: dg.AssetExecutionContext, config: AtlasRun, workshop: Workshop) -> dg.MaterializeResult:
    """The generation that readers see: promoted when no check fails and nothing is worse than in the one before."""
    from sae_core.generations import served
    from sae_core.promotion import build_atlas
    from sae_core.serve.map_data import MapData
    from sae_core.word_index import WordIndex

    result = workshop.make(
        context, "retraining", config,
        lambda order, draft, report: build_atlas(
            order.study.retraining, draft.parents, workshop.store, draft.folder, workshop.verdicts(order, draft.parents)
        ),
        _report,
    )  # fmt: skip
    readers = served(workshop.store, context.partition_key)
    WordIndex.open(readers, context.partition_key)  # these two so that no reader waits
    MapData(readers, context.partition_key)
    return result


def _report(made: Made) -> dict[str, Any]:
    from sae_core.promotion import REPORT

    return {"report": dg.MetadataValue.md((made.folder / REPORT).read_text("utf-8"))}
