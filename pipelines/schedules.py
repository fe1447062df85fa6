"""Schedules: when built studies are made fresh, one for each study that says when."""

import dagster as dg

from assets.partitions import STUDIES
from assets.resources import Workshop
from pipelines.jobs import build_atlas, build_config, is_built
from sae_core.study import Study


def _schedule(study: Study) -> dg.ScheduleDefinition:
    @dg.schedule(
        name=f"retrain_{study.name.replace('-', '_')}",
        job=build_atlas,
        cron_schedule=study.retraining.schedule,
        description=f"Make again what changed text, settings, model or code left stale in {study.name}. Off until "
        "turned on.",
    )
    def retrain_study(context: dg.ScheduleEvaluationContext, workshop: Workshop) -> dg.RunRequest | dg.SkipReason:
        if not is_built(study, workshop.store):
            return dg.SkipReason(f"{study.name} was never made: `mind-atlas run {study.name}` makes it")
        return dg.RunRequest(run_config=build_config(study))

    return retrain_study


SCHEDULES = [_schedule(study) for study in STUDIES if study.retraining.schedule]
