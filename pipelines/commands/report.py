"""Commands that make a report on request, through Dagster, and show it."""

from pathlib import Path
from typing import Any

import click

from pipelines.commands.shared import Command, as_json, on_device, study_name, work


def into(command: Command) -> Command:
    """Add `--into`."""
    help_ = "Put the report into this Markdown file, at its marks."
    return click.option("--into", type=click.Path(path_type=Path), help=help_)(command)


@click.command()
@click.argument("study", default="quickstart")
@on_device
@into
@as_json
@click.pass_obj
def steering_report(debug: bool, study: str, device: str, into: Path | None, json_: bool) -> None:
    """What steering with STUDY's features does to texts, measured against four controls."""
    from pipelines.console import print_json
    from pipelines.reports import show_report
    from sae_core.steering_report import read_report

    made = _put(debug, study, device, "steering_report", {}, into)
    if json_:
        print_json([row._asdict() for row in read_report(made.folder)])
    else:
        show_report(made, json_)


@click.command()
@click.argument("study", default="quickstart")
@click.option("--concepts", type=click.Path(path_type=Path), help="Folder of concept files of your own.")
@click.option("--only", multiple=True, metavar="NAME", help="Audit this concept; may be given several times.")
@on_device
@into
@as_json
@click.pass_obj
def audit(
    debug: bool, study: str, concepts: Path | None, only: tuple[str, ...], device: str, into: Path | None, json_: bool
) -> None:
    """Which features of STUDY's dictionary stand for the concepts of the safety catalog, and how far to trust them."""
    changes: dict[str, Any] = {"folder": str(concepts.expanduser().absolute())} if concepts else {}
    _show(debug, study, device, "safety", changes | ({"concepts": list(only)} if only else {}), into, json_)


@click.command()
@click.argument("study", default="quickstart")
@on_device
@into
@as_json
@click.pass_obj
def behaviors(debug: bool, study: str, device: str, into: Path | None, json_: bool) -> None:
    """What steering with the features of the audit does to flips, flattery and pronouns, against controls."""
    _make(debug, study, device, "safety", {})
    _show(debug, study, device, "behaviors", {}, into, json_)


@click.command()
@click.argument("study", default="quickstart")
@on_device
@into
@as_json
@click.pass_obj
def multilingual(debug: bool, study: str, device: str, into: Path | None, json_: bool) -> None:
    """Which features of STUDY's dictionary fire on the same content in several languages, against shuffled pairs."""
    _show(debug, study, device, "multilingual", {}, into, json_)


def _show(
    debug: bool, study: str, device: str, stage: str, changes: dict[str, Any], into: Path | None, json_: bool
) -> None:
    """Make a report, put it into a page if there is one, and show it."""
    from pipelines.reports import show_report

    show_report(_put(debug, study, device, stage, changes, into), json_)


def _put(debug: bool, study: str, device: str, stage: str, changes: dict[str, Any], into: Path | None) -> Any:
    """Make a report, and put it into a page if there is one."""
    from pipelines.reports import insert

    target = into.absolute() if into else None
    made = _make(debug, study, device, stage, changes)
    if target:
        insert(made, target)
    return made


def _make(debug: bool, study: str, device: str, stage: str, changes: dict[str, Any]) -> Any:
    """A report of a study's first dictionary, made through Dagster unless it is there."""
    name = study_name(study)
    from assets.partitions import STUDIES
    from assets.resources import Workshop
    from pipelines.run import materialize
    from sae_core.studies import Order

    wanted, workshop = STUDIES.get(name), Workshop(device=device)
    slug = wanted.spec(wanted.dictionaries[0]).slug
    recipe = Order(wanted, wanted.dictionaries[0]).override(stage, changes).recipe(stage, slug)
    if workshop.store.status(recipe).state != "made":
        with work(debug) as (instance, level):
            materialize(stage, slug, wanted, workshop, instance, level, **changes)
    return workshop.store.get(stage, slug)
