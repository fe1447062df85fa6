"""What Dagster loads: assets, checks, jobs, schedules, sensors and the one resource."""

import dagster as dg

from assets.resources import Workshop
from pipelines.jobs import build_atlas, retrain
from pipelines.run import ASSETS, STAGE_JOBS
from pipelines.schedules import SCHEDULES
from pipelines.sensors import SENSORS


def build_defs(workshop: Workshop | None = None) -> dg.Definitions:
    """Fresh definitions; tests and the command line give a workshop of their own."""
    return dg.Definitions(
        assets=ASSETS,
        jobs=[build_atlas, retrain, *STAGE_JOBS],
        schedules=SCHEDULES,
        sensors=SENSORS,
        resources={"workshop": workshop or Workshop()},
        executor=dg.multiprocess_executor.configured({"max_concurrent": 2}),
    )


defs = build_defs()
