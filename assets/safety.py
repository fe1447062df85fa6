"""Safety: for each concept of the catalog its best features, judged on unseen prompts; and monitors. On demand."""

from typing import Any

import dagster as dg

from assets.checks import specs
from assets.features import features
from assets.partitions import dictionaries
from assets.resources import Workshop, launchpad
from sae_core.artifacts import Made
from sae_core.stages import ON_DEMAND
from sae_core.study import SafetySettings

SafetyRun = launchpad(SafetySettings)


@dg.asset(
    partitions_def=dictionaries,
    deps=[features],
    group_name="reports",
    kinds={"scikitlearn", "parquet"},
    code_version=str(ON_DEMAND["safety"]),
    check_specs=specs("safety"),
)
def safety(context: dg.AssetExecutionContext, config: SafetyRun, workshop: Workshop) -> dg.MaterializeResult:
    """Features for concepts, their AUC beside a linear probe, the words and random features; calibrated monitors."""
    from sae_core.atlas import Atlas
    from sae_core.language_model import LanguageModel
    from sae_core.safety.audit import build_audit

    slug = context.partition_key
    before = workshop.store.manifest("safety", slug)
    return workshop.make(
        context, "safety", config,
        lambda order, draft, report: build_audit(
            order.study.safety, Atlas(workshop.store, slug),
            LanguageModel.load(order.study.model, workshop.torch_device(), order.study.activations.precision),
            draft.folder, before.summary if before else None, report,
        ),
        _report,
    )  # fmt: skip


def _report(made: Made) -> dict[str, Any]:
    return {"report": dg.MetadataValue.md((made.folder / "audit.md").read_text("utf-8"))}
