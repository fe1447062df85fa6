"""Commands that look after what was made."""

import click

from pipelines.commands.shared import as_json, chosen, open_atlas, study_name
from sae_core.artifacts import ArtifactStore, home
from sae_core.errors import MindAtlasError


@click.command()
@click.option("--study", default="", help="Only what this study asks for; otherwise everything that is finished.")
@click.option("--repair", is_flag=True, help="Remove damaged files, so that the next run makes these again.")
@as_json
def verify(study: str, repair: bool, json_: bool) -> None:
    """Read everything made to the last byte and compare checksums; the exit status is 1 if something is damaged."""
    from sae_core.verify import verify as check

    keys = []
    if study:
        name = study_name(study)
        from assets.partitions import STUDIES
        from sae_core.stages import recipes

        keys = [recipe.key for recipe in recipes(STUDIES.get(name))]
    from pipelines.console import out, print_json

    found = []
    for verdict in check(ArtifactStore(home()), keys, repair=repair):
        found.append(verdict._asdict())
        if not json_:
            sound = f"{verdict.files} files, {verdict.gigabytes:.2f} GB, as they were made"
            out.print(f"{verdict.artifact}: {'; '.join(verdict.damage.values()) or sound}", markup=False)
    if json_:
        print_json(found)
    if broken := sum(len(verdict["damage"]) for verdict in found):
        cure = "removed; `mind-atlas run` makes them" if repair else "`mind-atlas verify --repair` and `run` make them"
        raise MindAtlasError(f"{broken} damaged files: {cure} again")


@click.command()
@chosen
def rollback(study: str, dictionary: str) -> None:
    """Serve the generation before the one that is served, and promote the latter no more."""
    from pipelines.console import out
    from sae_core.atlas import write_views
    from sae_core.generations import roll_back

    name = open_atlas(study, dictionary).dictionary
    generation = roll_back(store := ArtifactStore(home()), name)
    write_views(store)
    out.print(f"{name}: generation {generation.number} is served", markup=False)


@click.command()
@click.option("--keep", default=3, show_default=True, type=click.IntRange(1), help="Generations of each atlas to keep.")
@click.option("--dry-run", is_flag=True, help="Only say what would be deleted.")
def gc(keep: int, dry_run: bool) -> None:
    """Delete what no kept generation needs, nobody reads, and no run is making."""
    from pipelines.console import out
    from sae_core.generations import collect, outdated

    store, total = ArtifactStore(home()), 0
    with store.lock(wait=False):
        for folder in outdated(store, keep):
            size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
            total += size
            out.print(f"{size / 1e6:10,.1f} MB  {folder}", markup=False)
        if not dry_run:
            collect(store, keep)
    out.print(f"{total / 1e6:10,.1f} MB  {'would be deleted' if dry_run else 'deleted'}", markup=False)
