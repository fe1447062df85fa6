"""What several commands share: their options, and the way to what an option means."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from sae_core.artifacts import PROJECT, ArtifactStore, home

Command = Callable[..., Any]


def as_json(command: Command) -> Command:
    """Add `--json`."""
    return click.option("--json", "json_", is_flag=True, help="Print one JSON document for machines.")(command)


def on_device(command: Command) -> Command:
    """Add `--device`."""
    help_ = "cpu, cuda, cuda:1; auto takes a CUDA device when there is one."
    return click.option("--device", default="auto", help=help_)(command)


def chosen(command: Command) -> Command:
    """Add `--study` and `--dictionary`; without them, the newest finished dictionary is meant."""
    command = click.option("--dictionary", default="", help="Name of a dictionary (default: the newest).")(command)
    return click.option("--study", default="", help="Study whose first dictionary is meant.")(command)


def settle() -> None:
    """Where Dagster keeps its runs: DAGSTER_HOME, or the project's folder."""
    os.environ.setdefault("DAGSTER_HOME", str(PROJECT))
    if Path(os.environ["DAGSTER_HOME"]) == PROJECT:
        os.chdir(PROJECT)  # dagster.yaml's paths are seen from the project's folder


@contextmanager
def work(debug: bool) -> Iterator[tuple[Any, str]]:
    """Dagster's record of runs and the level of its log, with progress shown as long as they are open."""
    settle()
    import dagster as dg
    from filelock import FileLock

    from pipelines.console import progress

    # Two that start at once would both make its tables, and one of them fail.
    with FileLock(Path(os.environ["DAGSTER_HOME"]) / ".dagster.lock"):
        instance = dg.DagsterInstance.get()
        _ = instance.run_storage, instance.event_log_storage, instance.schedule_storage
    with instance, progress():
        yield instance, "DEBUG" if debug else "CRITICAL"


def study_name(study: str) -> str:
    """The name of a study that is given by its name or by the path of its file."""
    from sae_core.studies import adopt

    return adopt(Path(study)) if study.endswith(".toml") else study


def open_atlas(study: str, dictionary: str) -> Any:
    """The atlas that `--study` and `--dictionary` mean."""
    from sae_core.atlas import Atlas

    if study and not dictionary:
        name = study_name(study)
        from assets.partitions import STUDIES

        wanted = STUDIES.get(name)
        dictionary = wanted.spec(wanted.dictionaries[0]).slug
    return Atlas.open(ArtifactStore(home()), dictionary)


def open_model(atlas: Any, as_harvested: bool = False) -> Any:
    """The language model that an atlas describes; in float32, or in the precision of its activations."""
    from assets.partitions import STUDIES
    from sae_core.language_model import LanguageModel

    study = STUDIES.order(atlas.dictionary).study
    return LanguageModel.load(study.model, precision=study.activations.precision if as_harvested else "float32")


def build(debug: bool, name: str, until: str, **machine: Any) -> Any:
    """Make what a study's stages lack, up to one of them, with progress; returns the study."""
    from assets.partitions import STUDIES
    from assets.resources import Workshop
    from pipelines.console import err
    from pipelines.run import bring_up_to_date

    said = {"made": "cached", "refused": "refused"}
    wanted, workshop = STUDIES.get(name), Workshop(**machine)
    with work(debug) as (instance, level):
        for recipe, status in bring_up_to_date(wanted, workshop, instance, until=until, log_level=level):
            was = f"{said.get(status.state, 'made')}{f' ({status.why})' if status.why else ''}"
            err.print(f"{recipe.stage:<12} {recipe.slug}: {was}", markup=False)
    return wanted
