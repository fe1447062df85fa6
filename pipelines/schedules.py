"""Schedules: when built studies are made fresh."""

import dagster as dg

from pipelines.jobs import retrain

weekly_retraining = dg.ScheduleDefinition(
    name="weekly_retraining",
    job=retrain,
    cron_schedule="0 3 * * 1",
    description="Mondays at 3: re-make what changed texts, settings or code have made stale. Off until turned on.",
)
