"""Sensors: retrain what has changed, and tell somebody how a run ended."""

from collections.abc import Iterator

import dagster as dg

from assets.partitions import STUDIES
from assets.resources import Workshop
from pipelines.jobs import build_atlas, build_config, is_built, retrain
from pipelines.run import plan
from sae_core.errors import MindAtlasError
from sae_core.notify import notify
from sae_core.settings import fingerprint


@dg.sensor(
    job=build_atlas,
    minimum_interval_seconds=300,
    description="Changed text, model or settings of a built study. Off until turned on.",
)
def changes(context: dg.SensorEvaluationContext, workshop: Workshop) -> Iterator[dg.RunRequest | dg.SkipReason]:
    """Ask for a retraining of each built study, once for each new state of what it is made from."""
    silent = True
    for study in STUDIES:
        if not is_built(study, workshop.store):
            continue
        try:
            stale = [step for step in plan(study, workshop.store) if step.status.state not in {"made", "refused"}]
        except MindAtlasError as error:  # a folder that is gone today must not stop the others
            context.log.warning(f"{study.name}: {error}")
            continue
        if stale:
            silent = False
            made = {s.recipe.key: workshop.store.manifest(s.recipe.stage, s.recipe.slug) for s in stale}
            was = {key: manifest.fingerprint if manifest else "" for key, manifest in made.items()}
            key = fingerprint(
                [study.name, was, [s.recipe.fingerprint for s in stale]]
            )  # back to an earlier text counts
            why = f"{stale[0].recipe.stage}: {stale[0].status.why}"
            yield dg.RunRequest(run_key=key, run_config=build_config(study), tags={"mind_atlas/changed": why[:200]})
    if silent:
        yield dg.SkipReason("nothing that a built study is made from has changed")


@dg.run_status_sensor(
    run_status=dg.DagsterRunStatus.SUCCESS,
    monitored_jobs=[build_atlas, retrain],
    description="Tells MIND_ATLAS_WEBHOOK that an atlas is up to date.",
)
def tell_success(context: dg.RunStatusSensorContext) -> None:
    """One message for each whole run."""
    notify(f"{context.dagster_run.job_name} succeeded", context.dagster_run.run_id)


@dg.run_failure_sensor(
    monitored_jobs=[build_atlas, retrain], description="Tells MIND_ATLAS_WEBHOOK why a run failed, or was refused."
)
def tell_failure(context: dg.RunFailureSensorContext) -> None:
    """One message for each whole run, with the line that says why."""
    steps = context.get_step_failure_events()
    data = steps[0].step_failure_data if steps else None
    why = data.user_failure_data.description if data and data.user_failure_data else context.failure_event.message
    notify(f"{context.dagster_run.job_name} failed: {why}", context.dagster_run.run_id)


SENSORS = [changes, tell_success, tell_failure]
