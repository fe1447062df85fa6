"""Sensors: retrain when the text that a built study reads has changed."""

from collections.abc import Iterator

import dagster as dg

from assets.partitions import STUDIES
from assets.resources import Workshop
from pipelines.jobs import retrain
from sae_core.errors import MindAtlasError
from sae_core.settings import fingerprint


@dg.sensor(
    job=retrain,
    minimum_interval_seconds=300,
    description="New, changed or removed files in the corpus of a built study. Off until turned on.",
)
def corpus_files(context: dg.SensorEvaluationContext, workshop: Workshop) -> Iterator[dg.RunRequest | dg.SkipReason]:
    """Ask for a retraining once for each new state of the built corpora."""
    stale, broken = {}, []
    for name in workshop.store.slugs("corpus"):
        if name not in STUDIES.corpora:
            continue
        try:
            recipe = STUDIES.corpora[name].recipe("corpus", name)
        except MindAtlasError as error:  # a folder that is gone today must not stop the others
            broken.append(f"{name}: {error}")
            continue
        if workshop.store.status(recipe).state == "stale":
            made = workshop.store.get("corpus", name).manifest.fingerprint
            stale[name] = [made, recipe.fingerprint]  # going back to an earlier text is a change, too
    if stale:
        yield dg.RunRequest(run_key=fingerprint(stale), tags={"mind_atlas/changed": ", ".join(sorted(stale))})
    else:
        yield dg.SkipReason("; ".join(broken) or "no built corpus has changed")
