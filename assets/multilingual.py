"""Multilingual: which features fire on the same content across languages, against shuffled pairs. On demand."""

from typing import Any

import dagster as dg

from assets.checks import specs
from assets.features import features
from assets.partitions import dictionaries
from assets.resources import Workshop, launchpad
from sae_core.artifacts import Made
from sae_core.stages import ON_DEMAND
from sae_core.study import MultilingualSettings

MultilingualRun = launchpad(MultilingualSettings)


@dg.asset(
    partitions_def=dictionaries,
    deps=[features],
    group_name="reports",
    kinds={"parquet"},
    code_version=str(ON_DEMAND["multilingual"]),
    check_specs=specs("multilingual"),
)
def multilingual(
    context: dg.AssetExecutionContext, config: MultilingualRun, workshop: Workshop
) -> dg.MaterializeResult:
    """Parallel texts (Bible verses, the Declaration of Human Rights): what features share across languages."""
    from sae_core.atlas import Atlas
    from sae_core.language_model import LanguageModel
    from sae_core.multilingual import build_multilingual

    return workshop.make(
        context, "multilingual", config,
        lambda order, draft, report: build_multilingual(
            order.study.multilingual, Atlas(workshop.store, context.partition_key),
            LanguageModel.load(order.study.model, workshop.torch_device(), order.study.activations.precision),
            draft.folder, report,
        ),
        _report,
    )  # fmt: skip


def _report(made: Made) -> dict[str, Any]:
    return {"report": dg.MetadataValue.md((made.folder / "multilingual.md").read_text("utf-8"))}
