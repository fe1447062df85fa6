"""Activations: the model run over the corpus up to one layer, its vectors kept in shuffled shards."""

from typing import Any

import dagster as dg

from assets.checks import specs
from assets.corpus import corpus
from assets.partitions import corpus_of_site, sites
from assets.resources import Workshop, launchpad
from sae_core.artifacts import Draft
from sae_core.progress import Report
from sae_core.stages import VERSIONS
from sae_core.studies import Order
from sae_core.study import ActivationSettings

ActivationsRun = launchpad(ActivationSettings, "hook", "layer")


@dg.asset(
    partitions_def=sites,
    deps=[dg.AssetDep(corpus, partition_mapping=corpus_of_site)],
    group_name="activations",
    kinds={"pytorch", "safetensors"},
    code_version=str(VERSIONS["activations"]),
    check_specs=specs("activations"),
)
def activations(context: dg.AssetExecutionContext, config: ActivationsRun, workshop: Workshop) -> dg.MaterializeResult:
    """Vectors of one site for every token of the corpus; attention sinks are marked. NaN is refused on the way."""
    from sae_core.activations import harvest
    from sae_core.activations.elsewhere import forget_older
    from sae_core.door import require_batch, require_site

    def build(order: Order, draft: Draft, report: Report) -> dict[str, Any]:
        study, corpus = order.study, draft.parents["corpus"]
        require_site(study, report)
        require_batch(study, corpus.manifest.summary)
        with workshop.pool() as pool:
            return harvest(
                study.activations, study.model, corpus.folder, draft.folder, workshop.torch_device(), report,
                workshop.elsewhere(draft), pool, workshop.other_sites(context, order),
            )  # fmt: skip

    result = workshop.make(context, "activations", config, build)
    forget_older(workshop.store.get("activations", context.partition_key).folder)
    return result
