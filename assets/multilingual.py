"""Multilingual, on demand: which features fire on the same content across languages, against shuffled pairs."""

from typing import Any

from assets.features import features
from assets.per_dictionary import REPORTS, Task, markdown, per_dictionary
from sae_core.study import MultilingualSettings


@per_dictionary(MultilingualSettings, [features], REPORTS, {"parquet"}, markdown)
def multilingual(task: Task) -> dict[str, Any]:
    """Parallel texts (Bible verses, human rights, encyclopedia articles): what features share across languages."""
    from sae_core.atlas import Atlas
    from sae_core.language_model import LanguageModel
    from sae_core.multilingual import build_multilingual

    study = task.study
    lm = LanguageModel.load(study.model, task.workshop.torch_device(), study.activations.precision)
    atlas = Atlas(task.workshop.store, task.slug)
    return build_multilingual(study.multilingual, atlas, lm, task.draft.folder, task.report)
