"""Bringing a study up to date, through Dagster: the one way the command line, a job and a schedule all use."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import dagster as dg

from assets.activations import activations
from assets.atlas import atlas
from assets.circuits import circuit
from assets.corpus import corpus
from assets.dictionary import dictionary
from assets.feature_map import feature_map
from assets.features import features
from assets.labels import labels
from assets.multilingual import multilingual
from assets.neighbors import neighbors
from assets.partitions import circuits, corpora, dictionaries, sites
from assets.resources import STUDY_TAG, Workshop
from assets.safety import behaviors, safety
from assets.science import scaling, science
from assets.steering import steering, steering_report
from sae_core.artifacts import ATLAS, ArtifactStore, Recipe, Status
from sae_core.generations import why_refused
from sae_core.stages import ON_DEMAND, PER_STUDY, SITE_REPORTS, VERSIONS, recipes
from sae_core.study import Study

ASSETS = [
    corpus, activations, dictionary, features, neighbors, feature_map, steering, labels, atlas, steering_report, safety,
    behaviors, multilingual, circuit, scaling, science,
]  # fmt: skip

make_corpus = dg.define_asset_job(
    "make_corpus", selection="key:corpus", partitions_def=corpora, description="One corpus."
)
make_activations = dg.define_asset_job(
    "make_activations", selection="key:activations", partitions_def=sites, description="One site's activations."
)
make_dictionary = dg.define_asset_job(
    "make_dictionary",
    selection="key:dictionary+ and not group:reports and not group:circuits",
    partitions_def=dictionaries,
    description="One dictionary and everything that follows from it.",
)
make_reports = dg.define_asset_job(
    "make_reports", selection="group:reports", partitions_def=dictionaries, description="What is made on demand."
)
make_circuits = dg.define_asset_job(
    "make_circuits", selection="group:circuits", partitions_def=circuits, description="One task's circuit."
)
make_science = dg.define_asset_job(
    "make_science", selection="group:science", partitions_def=sites, description="One site's laws, and what holds."
)
STAGE_JOBS = [make_corpus, make_activations, make_dictionary, make_reports, make_circuits, make_science]


class Step(NamedTuple):
    """One stage of a study, and how it stood."""

    recipe: Recipe
    status: Status


def plan(study: Study, store: ArtifactStore) -> list[Step]:
    """Every stage of the study, parents first, made, stale or missing, and why."""
    return [Step(recipe, _status(study, store, recipe)) for recipe in recipes(study)]


def _status(study: Study, store: ArtifactStore, recipe: Recipe) -> Status:
    """How an artifact stands; an atlas that was refused is not made again until it, or what bounds it, changes."""
    status = store.status(recipe)
    if recipe.stage == ATLAS and status.state != "made":
        why = why_refused(store, recipe.slug, recipe.fingerprint, study.retraining)
        return Status("refused", why) if why else status
    return status


def bring_up_to_date(
    study: Study, workshop: Workshop, instance: dg.DagsterInstance, *, until: str = ATLAS, log_level: str = "INFO"
) -> Iterator[Step]:
    """Make what is missing or stale, one Dagster run a stage, and yield each step when it is done or was found made.

    Args:
        study: what is wanted.
        workshop: where it is made.
        instance: where Dagster keeps its runs.
        until: nothing that comes after this stage is made; after the last one come the circuits that a study names.
        log_level: of Dagster's console log.

    Raises:
        Exception: what the failing stage raised; what was made before stays.
    """
    wanted = list(VERSIONS)[: list(VERSIONS).index(until) + 1] + (list(PER_STUDY) if until == ATLAS else [])
    ahead = [recipe for recipe in recipes(study) if recipe.stage in wanted]  # all: a wrong name is refused at the door
    for recipe in ahead:
        step = Step(recipe, _status(study, workshop.store, recipe))
        if step.status.state not in {"made", "refused"}:
            materialize(recipe.stage, recipe.slug, study, workshop, instance, log_level)
        yield step


def materialize(
    stage: str, slug: str, study: Study, workshop: Workshop, instance: dg.DagsterInstance, log_level: str,
    **config: Any,
) -> None:  # fmt: skip
    """One stage of a study, as one Dagster run; `config` is its run config. Raises what the stage raises."""
    defs = dg.Definitions(assets=ASSETS, jobs=STAGE_JOBS, resources={"workshop": workshop})
    own = {"corpus": "make_corpus", "activations": "make_activations", "circuit": "make_circuits"}
    stage_job = dict.fromkeys(ON_DEMAND, "make_reports") | own | dict.fromkeys(SITE_REPORTS, "make_science")
    defs.resolve_job_def(stage_job.get(stage, "make_dictionary")).execute_in_process(
        partition_key=slug,
        asset_selection=[dg.AssetKey(stage)],
        instance=instance,
        run_config={
            "loggers": {"console": {"config": {"log_level": log_level}}}, "ops": {stage: {"config": config}},
        },
        tags={STUDY_TAG: study.name},
    )  # fmt: skip
