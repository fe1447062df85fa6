"""Science, on demand: how dictionaries of a site scale, and which of the papers' findings hold for them."""

import dagster as dg

from assets.activations import activations
from assets.checks import specs
from assets.corpus import corpus
from assets.partitions import corpus_of_site, sites
from assets.per_dictionary import markdown
from assets.plots import scaling_pictures
from assets.resources import Workshop, launchpad
from sae_core.stages import ON_DEMAND
from sae_core.study import ScalingSettings, ScienceSettings

ScalingRun, ScienceRun = launchpad(ScalingSettings), launchpad(ScienceSettings)


@dg.asset(
    partitions_def=sites,
    deps=[activations],
    group_name="science",
    kinds={"pytorch", "markdown"},
    code_version=str(ON_DEMAND["scaling"]),
    check_specs=specs("scaling"),
)
def scaling(context: dg.AssetExecutionContext, config: ScalingRun, workshop: Workshop) -> dg.MaterializeResult:
    """Many short runs at a site, of several sizes, lengths, rates and k, and the laws that their losses follow."""
    from sae_core.science.scaling import build_scaling

    return workshop.make(
        context, "scaling", config,
        lambda order, draft, report: build_scaling(
            order.study.scaling, order.study.dictionaries[0], draft.parents["activations"].folder, draft.folder,
            workshop.torch_device(), report,
        ),
        lambda made: markdown(made) | scaling_pictures(made.folder),
    )  # fmt: skip


@dg.asset(
    partitions_def=sites,
    deps=[scaling, activations, dg.AssetDep(corpus, partition_mapping=corpus_of_site)],
    group_name="science",
    kinds={"pytorch", "markdown"},
    code_version=str(ON_DEMAND["science"]),
    check_specs=specs("science"),
)
def science(context: dg.AssetExecutionContext, config: ScienceRun, workshop: Workshop) -> dg.MaterializeResult:
    """The papers' findings on the sweep's dictionaries: seeds, splitting, coverage, kinds of text, against controls."""
    from sae_core.science.findings import Given
    from sae_core.science.report import build_science

    return workshop.make(
        context, "science", config,
        lambda order, draft, report: build_science(
            order.study.science,
            Given(
                order.study.model, order.study.activations, draft.parents["scaling"].folder,
                draft.parents["activations"].folder, draft.parents["corpus"].folder, order.study.labels,
            ),
            draft.folder, workshop.torch_device(), report,
        ),
        markdown,
    )  # fmt: skip
