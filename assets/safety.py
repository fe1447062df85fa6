"""Safety, on demand: features for concepts, monitors that they make, and what steering with them does to behaviors."""

from typing import Any

from assets.features import features
from assets.per_dictionary import REPORTS, Task, markdown, per_dictionary
from assets.steering import steering
from sae_core.study import BehaviorSettings, SafetySettings


@per_dictionary(SafetySettings, [features, steering], REPORTS, {"scikitlearn", "parquet"}, markdown)
def safety(task: Task) -> dict[str, Any]:
    """Features for concepts, their AUC beside a linear probe, the words and random features; calibrated monitors."""
    from sae_core.atlas import Atlas
    from sae_core.language_model import LanguageModel
    from sae_core.safety.audit import build_audit

    study, store, parents = task.study, task.workshop.store, task.draft.parents
    before = store.manifest("safety", task.slug)
    return build_audit(
        study.safety, Atlas(store, task.slug),
        LanguageModel.load(study.model, task.workshop.torch_device(), study.activations.precision),
        parents["steering"].folder, task.draft.folder, before.summary if before else None, task.report,
    )  # fmt: skip


@per_dictionary(BehaviorSettings, [features, safety], REPORTS, {"pytorch", "parquet"}, markdown)
def behaviors(task: Task) -> dict[str, Any]:
    """Flips when asked for certainty, praise of bad poems, pronouns of professions: steered, against controls."""
    from sae_core.safety.behaviors import build_behaviors

    audit = task.draft.parents["safety"].folder
    return build_behaviors(task.study.behaviors, task.subject(), audit, task.draft.folder, task.report)
