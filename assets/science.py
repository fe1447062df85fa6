"""Science, on demand: how dictionaries of a site scale."""

import dagster as dg

from assets.activations import activations
from assets.checks import specs
from assets.partitions import sites
from assets.per_dictionary import markdown
from assets.plots import scaling_pictures
from assets.resources import Workshop, launchpad
from sae_core.stages import ON_DEMAND
from sae_core.study import ScalingSettings

ScalingRun = launchpad(ScalingSettings)


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
