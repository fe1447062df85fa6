"""Dictionary: sparse features learned from the activations of a site, and how well they stand for them."""

import dagster as dg

from assets.activations import activations
from assets.checks import specs
from assets.corpus import corpus
from assets.partitions import corpus_of_dictionary, dictionaries, sites_of_dictionary
from assets.plots import frontier_picture, training_curves
from assets.resources import Workshop, launchpad
from sae_core.artifacts import Made, second
from sae_core.frontier import frontier
from sae_core.names import DictionarySpec
from sae_core.stages import VERSIONS
from sae_core.study import DictionarySettings

NAMED = ("architecture", "d_sae", "k", "l1_coefficient", "variant", "writes", "writes_layer")
DictionaryRun = launchpad(DictionarySettings, *NAMED)


@dg.asset(
    partitions_def=dictionaries,
    deps=[
        dg.AssetDep(activations, partition_mapping=sites_of_dictionary),
        dg.AssetDep(corpus, partition_mapping=corpus_of_dictionary),
    ],
    group_name="dictionary",
    kinds={"pytorch", "safetensors"},
    code_version=str(VERSIONS["dictionary"]),
    check_specs=specs("dictionary"),
)
def dictionary(context: dg.AssetExecutionContext, config: DictionaryRun, workshop: Workshop) -> dg.MaterializeResult:
    """A sparse autoencoder, trained with checkpoints or imported, of unit decoder rows, measured on held-out text."""
    from sae_core.training import build_dictionary

    return workshop.make(
        context, "dictionary", config,
        lambda order, draft, report: build_dictionary(
            order.trained, order.study.activations, order.study.model,
            draft.parents["corpus"].folder, draft.parents["activations"].folder, draft.folder,
            workshop.torch_device(), report, workshop.others(context, order),
            workshop.previous(draft.recipe.slug, draft.fingerprint), order.study.retraining.warm_start,
            second(draft.parents, "activations"),
        ),
        lambda made: _pictures(workshop, made),
    )  # fmt: skip


def _pictures(workshop: Workshop, made: Made) -> dict[str, dg.MetadataValue]:
    """How it was learned, and how it stands among the site's others."""
    site = DictionarySpec.parse(made.manifest.slug).site
    return training_curves(made.folder / "metrics.parquet") | frontier_picture(frontier(workshop.store, site))
