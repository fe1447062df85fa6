"""Commands about dictionaries as a kind: how they scale, and how large one is worth its time."""

import re
from pathlib import Path

import click

from pipelines.commands.report import into
from pipelines.commands.shared import as_json, build, on_device, study_name, work
from sae_core.artifacts import ArtifactStore, home

_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


class Duration(click.ParamType):
    """Seconds, from `90s`, `20m`, `2h`, `1h30m` or `1d`."""

    name = "duration"

    def convert(self, value: str | float, param: click.Parameter | None, context: click.Context | None) -> float:
        if isinstance(value, float):
            return value
        if not re.fullmatch(r"(\d+(\.\d+)?[smhd])+", value):
            self.fail(f"{value!r} is no duration: write 90s, 20m, 2h, 1h30m or 1d", param, context)
        return sum(float(n) * _SECONDS[unit] for n, _, unit in re.findall(r"(\d+(\.\d+)?)([smhd])", value))


@click.command()
@click.argument("study", default="quickstart")
@on_device
@into
@as_json
@click.pass_obj
def scaling(debug: bool, study: str, device: str, into: Path | None, json_: bool) -> None:
    """How the loss of STUDY's dictionaries falls with their size and training: a sweep of short runs, and its laws."""
    _show(debug, study, device, "scaling", into, json_)


@click.command()
@click.argument("study", default="quickstart")
@on_device
@into
@as_json
@click.pass_obj
def science(debug: bool, study: str, device: str, into: Path | None, json_: bool) -> None:
    """Which of the papers' findings hold at STUDY's site: a table of claims, with controls, from the same sweep."""
    _show(debug, study, device, "science", into, json_)


def _show(debug: bool, study: str, device: str, stage: str, into: Path | None, json_: bool) -> None:
    """Make a report of a study's first site and what it reads, and show it; or put them into a page with a picture."""
    from pipelines.reports import insert, show_report

    target = into.absolute() if into else None
    name = study_name(study)
    from assets.partitions import STUDIES
    from assets.resources import Workshop
    from pipelines.run import materialize
    from sae_core.stages import SITE_REPORTS
    from sae_core.studies import Order

    wanted, workshop = STUDIES.get(name), Workshop(device=device)
    build(debug, name, "activations", device=device)
    slug, order = wanted.site.slug, Order(wanted.at(wanted.activations), None)
    for needed in SITE_REPORTS[: SITE_REPORTS.index(stage) + 1]:
        if workshop.store.status(order.recipe(needed, slug)).state != "made":
            with work(debug) as (instance, level):
                materialize(needed, slug, wanted, workshop, instance, level)
        if target:
            insert(workshop.store.get(needed, slug), target)
    if target:
        from assets.plots import scaling_figure
        from sae_core.science.scaling import REPORT, Scaling

        sweep = Scaling.open(workshop.store.get("scaling", slug).folder / REPORT)
        scaling_figure(sweep).savefig(target.with_name("scaling.png"))
    show_report(workshop.store.get(stage, slug), json_)


@click.command()
@click.argument("study", default="quickstart")
@click.option("--budget", type=Duration(), help="Time that the dictionary may take: 20m, 2h, 1h30m.")
@click.option("--flops", type=float, help="Or floating-point operations of its training.")
@click.option("--tokens", type=click.IntRange(1), help="Or activations that it may see.")
@click.option("--into", type=click.Path(path_type=Path), help="Write the study with this dictionary into this file.")
@click.option("--run", "run_it", is_flag=True, help="Train it at once; needs --into.")
@on_device
@as_json
@click.pass_obj
def plan(
    debug: bool, study: str, budget: float | None, flops: float | None, tokens: int | None, into: Path | None,
    run_it: bool, device: str, json_: bool,
) -> None:  # fmt: skip
    """How large a dictionary STUDY's model is best given for a time, and how good it will be: measured on this machine.

    The law of losses is that of the study's site where `mind-atlas scaling` was run, else of a small model's.
    """
    if sum(given is not None for given in (budget, flops, tokens)) != 1:
        raise click.UsageError("say what may be spent: one of --budget 2h, --flops 1e15, --tokens 4000000")
    if run_it and not into:
        raise click.UsageError("--run needs --into FILE.toml: where the study goes that it runs")
    if into and into.suffix != ".toml":
        raise click.UsageError(f"--into {into}: the name of a study file ends in .toml")
    from sae_core.devices import torch_device
    from sae_core.science.planning import Budget, plan_study, planned
    from sae_core.studies import Studies, study_folders
    from sae_core.study_files import load_study, save_study

    wanted = load_study(Path(study)) if study.endswith(".toml") else Studies.load(*study_folders()).get(study)
    found = plan_study(wanted, Budget(budget, flops, tokens), ArtifactStore(home()), torch_device(device))
    if into:
        save_study(planned(wanted, found.proposal, into.stem), into)
    name = study_name(str(into)) if run_it else ""  # before the studies are read, which showing anything does
    from pipelines.console import out, print_json

    if json_:
        print_json(found._asdict() | {"proposal": found.proposal._asdict()})
    else:
        for line in (*found.text(), *([f"written: {into}"] if into else [])):
            out.print(line, markup=False)
    if run_it:
        build(debug, name, "dictionary", device=device)
