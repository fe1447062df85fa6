"""Jobs over whole studies; the jobs of single stages are in `pipelines.run`."""

from typing import Any

import dagster as dg
from pydantic import Field

from assets.partitions import STUDIES
from assets.resources import Workshop
from pipelines.run import bring_up_to_date
from sae_core.artifacts import ArtifactStore
from sae_core.errors import MindAtlasError
from sae_core.study import Study


class StudyRun(dg.Config):
    """Which study to bring up to date."""

    study: str = Field("quickstart", description="Name of a study.")


@dg.op(description="Make every stage of a study that is missing or stale, each as a run of its own.")
def study_up_to_date(context: dg.OpExecutionContext, config: StudyRun, workshop: Workshop) -> None:
    """Plan the study and follow the plan."""
    _follow(context, config.study, workshop)


@dg.op(description="Make again whatever is stale in every study that has been built here.")
def built_studies_up_to_date(context: dg.OpExecutionContext, workshop: Workshop) -> None:
    """A study counts as built when one of its dictionaries was made."""
    failed = {}
    for study in STUDIES:
        if is_built(study, workshop.store):
            try:
                _follow(context, study.name, workshop)
            except (MindAtlasError, dg.Failure) as error:  # one study's missing folder must not stop the others
                failed[study.name] = str(error)
    if failed:
        raise dg.Failure("; ".join(f"{name}: {error}" for name, error in failed.items()), allow_retries=False)


@dg.job(description="From text to a labeled atlas: everything of one study that is missing or stale.")
def build_atlas() -> None:
    """One study."""
    study_up_to_date()


@dg.job(description="Keep every built study fresh: changed text, settings or code re-make what follows from them.")
def retrain() -> None:
    """All built studies."""
    built_studies_up_to_date()


def is_built(study: Study, store: ArtifactStore) -> bool:
    """Whether one of the study's dictionaries was made."""
    return bool(set(store.slugs("dictionary")) & {one.spec(d).slug for one, d in study.trainings})


def build_config(study: Study) -> dict[str, Any]:
    """The run config of `build_atlas` for a study."""
    return {"ops": {"study_up_to_date": {"config": {"study": study.name}}}}


def _follow(context: dg.OpExecutionContext, name: str, workshop: Workshop) -> None:
    for recipe, status in bring_up_to_date(STUDIES.get(name), workshop, context.instance):
        was = f"{status.state} ({status.why})" if status.why else status.state
        context.log.info(f"{recipe.stage} {recipe.slug}: was {was}")
