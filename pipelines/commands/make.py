"""Commands that make an atlas, through Dagster, and say how far it is made."""

import click

from pipelines.commands.shared import as_json, build, chosen, on_device, open_atlas, settle, study_name, work
from sae_core.artifacts import ATLAS, ArtifactStore, home
from sae_core.errors import MindAtlasError, message_of
from sae_core.stages import VERSIONS


@click.command()
@click.argument("study", default="quickstart")
@on_device
@click.option(
    "--until", type=click.Choice(list(VERSIONS)), default=ATLAS, show_default=True, help="Make no stage after this."
)
@click.option("--workers", default=0, type=click.IntRange(0), help="Processes that read activations at once.")
@click.option("--ray", default="", metavar="ADDRESS", help="Read activations on a Ray cluster: auto, ray://host:10001.")
@as_json
@click.pass_obj
def run(debug: bool, study: str, device: str, until: str, workers: int, ray: str, json_: bool) -> None:
    """Make everything STUDY asks for that is missing or stale: a shipped study's name, or the path of a study file."""
    wanted = build(debug, study_name(study), until, device=device, workers=workers, ray=ray)
    if until == ATLAS:
        from pipelines.summary import show, summarize

        show(summarize(wanted, ArtifactStore(home())), json_)


@click.command()
@click.option("--feature", "numbers", multiple=True, type=int, metavar="N", help="May be given several times.")
@click.option("--dry-run", is_flag=True, help="Say what it would take in requests, tokens and dollars, and stop.")
@chosen
@as_json
@click.pass_obj
def label(
    debug: bool, numbers: tuple[int, ...], dry_run: bool, study: str, dictionary: str, json_: bool
) -> None:  # fmt: skip
    """Label single features with their study's label writer; all other labels stay as they are.

    With --dry-run and no --feature, the estimate is for all the features that the study has labeled.
    """
    if not numbers and not dry_run:
        raise click.UsageError("say which: --feature N; or --dry-run for what all the study's labels would cost")
    atlas = open_atlas(study, dictionary)
    from assets.partitions import STUDIES
    from pipelines.summary import show_estimate, show_labels

    order = STUDIES.order(atlas.dictionary, study_name(study) if study else None)
    if dry_run:
        from sae_core.labels.estimate import estimate_labels

        folder = atlas.store.get("features", atlas.dictionary).folder
        show_estimate(order.study.labels, estimate_labels(order.study.labels, folder, numbers), json_)
        return
    from assets.resources import Workshop
    from pipelines.run import materialize
    from sae_core.labels import Labels

    with work(debug) as (instance, level):
        materialize("labels", atlas.dictionary, order.study, Workshop(), instance, level, only=list(numbers))
    labels = Labels.open(ArtifactStore(home()).get("labels", atlas.dictionary).folder)
    show_labels([labels.label(number) for number in dict.fromkeys(numbers)], json_)


@click.command()
@on_device
@click.pass_obj
def refresh(debug: bool, device: str) -> None:
    """Make again what is stale in every study that was built; what the schedules do, by hand."""
    settle()
    from assets.partitions import STUDIES
    from pipelines.jobs import is_built

    built = [study.name for study in STUDIES if is_built(study, ArtifactStore(home()))]
    if not built:
        raise MindAtlasError("no study was built yet: `mind-atlas run` builds one")
    failed = {}
    for name in built:
        try:
            build(debug, name, ATLAS, device=device)
        except Exception as error:
            if not (message := message_of(error)):
                raise
            failed[name] = message
    if failed:
        raise MindAtlasError("; ".join(f"{name}: {message}" for name, message in failed.items()))


@click.command()
@click.argument("study", default="quickstart")
@as_json
def status(study: str, json_: bool) -> None:
    """For each stage of STUDY: made, stale or missing, and why."""
    name = study_name(study)
    from assets.partitions import STUDIES
    from pipelines.console import out, print_json, table
    from pipelines.run import plan

    steps = plan(STUDIES.get(name), ArtifactStore(home()))
    rows = [(s.recipe.stage, s.status.state, s.recipe.slug, s.status.why) for s in steps]
    if json_:
        print_json([dict(zip(("stage", "state", "slug", "why"), row, strict=True)) for row in rows])
    else:
        out.print(table(("stage", "state", "name", "why"), rows))
