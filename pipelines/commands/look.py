"""Commands that look into an atlas."""

import os
from pathlib import Path
from typing import Any

import click

from pipelines.commands.shared import as_json, chosen, open_atlas, open_model
from sae_core.artifacts import ArtifactStore, home


@click.command()
@click.option("--plot", type=click.Path(path_type=Path, dir_okay=False), help="Write FVU against L0 as a picture here.")
@as_json
def dictionaries(plot: Path | None, json_: bool) -> None:
    """Every finished dictionary, with what it costs in active features and what it explains with them."""
    from pipelines.console import out, print_json, table
    from sae_core.frontier import Point, frontier

    points = frontier(ArtifactStore(home()))
    if plot is not None:
        from assets.plots import frontier_figure

        frontier_figure(points).savefig(plot)
    if json_:
        print_json([point._asdict() for point in points])
    else:
        out.print(table(Point._fields, points))


@click.command()
@click.argument("words", nargs=-1, required=True)
@click.option("--limit", default=10, show_default=True, type=click.IntRange(1))
@chosen
@as_json
def features(words: tuple[str, ...], limit: int, study: str, dictionary: str, json_: bool) -> None:
    """Find features by WORDS in their labels, examples and promoted tokens."""
    from pipelines.console import out, print_json, table
    from sae_core.labels.reader import doubted

    atlas = open_atlas(study, dictionary)
    hits = atlas.search(" ".join(words), limit)
    if json_:
        print_json(hits)
    elif hits:
        rows = [(h.feature, doubted(h.label, h.beats_control), h.score, h.density, h.why) for h in hits]
        out.print(table(("feature", "label", "score", "density", "found in"), rows))
    else:
        out.print("nothing found: try fewer or other words", markup=False)


@click.command()
@click.option("--limit", default=10, show_default=True, type=click.IntRange(2), help="Labels shown, good and bad.")
@click.option("--labeler", default="current", show_default=True, help="Whose labels, where there are several.")
@click.option("--against", default="", metavar="LABELER", help="Feature by feature beside what another one wrote.")
@chosen
@as_json
def labels(limit: int, labeler: str, against: str, study: str, dictionary: str, json_: bool) -> None:
    """Who wrote labels, and the best and the worst of them with scores and controls."""
    from pipelines.console import print_json
    from pipelines.summary import extremes, show_compared, show_extremes
    from sae_core.labels.labelers import compare, labelers, open_labels

    atlas = open_atlas(study, dictionary)
    folder = atlas.store.get("labels", atlas.dictionary).folder
    rows = open_labels(folder, labeler).rows()
    if against:
        pairs = compare(rows, open_labels(folder, against).rows())
        print_json([pair._asdict() for pair in pairs]) if json_ else show_compared(pairs, limit)
        return
    known, some = labelers(folder), extremes(rows, atlas.features, limit)
    if json_:
        print_json({"labelers": [one._asdict() for one in known], "labels": some})
    else:
        show_extremes(known, some)


@click.command()
@click.argument("number", type=int)
@click.option("--examples", default=8, show_default=True, type=click.IntRange(0), help="Examples shown.")
@chosen
@as_json
def feature(number: int, examples: int, study: str, dictionary: str, json_: bool) -> None:
    """Feature NUMBER: its label, how often it fires and on what, what it promotes, and its neighbors."""
    from pipelines.console import print_json
    from pipelines.summary import show_feature

    atlas = open_atlas(study, dictionary)
    card = atlas.feature(number)
    print_json(card) if json_ else show_feature(card, examples)


@click.command()
@click.argument("text")
@click.option("--top", default=5, show_default=True, type=click.IntRange(1), help="Features shown for each token.")
@chosen
@as_json
def explain(text: str, top: int, study: str, dictionary: str, json_: bool) -> None:
    """Which features fire on TEXT, token by token."""
    from pipelines.console import out, print_json, table
    from sae_core.labels.reader import doubted

    atlas = open_atlas(study, dictionary)
    tokens = atlas.explain(open_model(atlas), text, top)
    if json_:
        print_json(tokens)
        return
    for token in tokens:
        out.print(f"\n{token.token!r}", style="bold", markup=False)
        rows = [(f.feature, f.value, doubted(f.label, f.beats_control)) for f in token.features]
        out.print(table(("feature", "activation", "label"), rows))


@click.command()
@click.option("--positive", "positive_file", type=click.Path(path_type=Path), help="Prompts, one a line, or JSONL.")
@click.option("--negative", "negative_file", type=click.Path(path_type=Path), help="The same, of the other kind.")
@click.option("--positive-text", multiple=True, metavar="TEXT", help="One positive; may be given several times.")
@click.option("--negative-text", multiple=True, metavar="TEXT", help="One negative.")
@click.option("--describe", default="", metavar="TEXT", help="Have the label writer write both sets from this.")
@click.option("--count", default=100, show_default=True, type=click.IntRange(10), help="Prompts a side it writes.")
@click.option("--save", type=click.Path(path_type=Path), help="Folder for the prompts that were written.")
@click.option("--prompt", default="", help="In place of two sets: what fires on this one prompt.")
@click.option(
    "--direction", type=click.Choice(["difference", "probe"]),
    help="Rank by the angle to the difference of the sets' means, or to a linear probe, in place of the activations.",
)  # fmt: skip
@click.option("--limit", default=10, show_default=True, type=click.IntRange(1))
@chosen
@as_json
def contrast(
    positive_file: Path | None, negative_file: Path | None, positive_text: tuple[str, ...],
    negative_text: tuple[str, ...], describe: str, count: int, save: Path | None, prompt: str,
    direction: str | None, limit: int, study: str, dictionary: str, json_: bool,
) -> None:  # fmt: skip
    """Features that tell two sets of prompts apart: chosen on one half of them, judged on the other."""
    from pipelines.console import print_json
    from pipelines.reports import show_contrast, show_rows
    from sae_core import prompt_search as by
    from sae_core.prompt_reader import PromptReader

    sides = [
        [*(by.read_prompts(file) if file else ()), *texts]
        for file, texts in ((positive_file, positive_text), (negative_file, negative_text))
    ]
    if sum(map(bool, (prompt, describe, any(sides)))) > 1:
        raise click.UsageError("give either two sets of prompts, or --describe, or --prompt")
    sets = None if prompt or describe else by.split_prompts(sides[0], sides[1])
    atlas = open_atlas(study, dictionary)
    if describe:
        sets = by.split_prompts(*_written(atlas, describe, count, save))
    reader = PromptReader.of(atlas, open_model(atlas))
    if sets is None:
        on_prompt = by.by_prompt(atlas, reader, prompt, limit)
        print_json([row._asdict() for row in on_prompt]) if json_ else show_rows(on_prompt)
    elif direction:
        raw = [reader.pool([*sets.find[side], *sets.test[side]]).raw for side in (0, 1)]
        near = by.nearest(atlas, reader, by.direction(raw[0], raw[1], direction), limit)  # type: ignore[arg-type]
        print_json([row._asdict() for row in near]) if json_ else show_rows(near)
    else:
        found = by.contrast(atlas, reader, sets, limit)
        print_json(found) if json_ else show_contrast(found)


def _written(atlas: Any, description: str, count: int, save: Path | None) -> tuple[list[str], list[str]]:
    """Prompts by the label writer of the atlas's study; kept in a folder when one is named."""
    from assets.partitions import STUDIES
    from pipelines.console import progress
    from sae_core.prompt_writer import write_prompts

    settings, key = STUDIES.order(atlas.dictionary).study.labels, os.environ.get("OPENAI_API_KEY") or "none"
    with progress() as watch:
        sides = write_prompts(settings, description, count, key, watch("prompts"))
    if save:
        save.mkdir(parents=True, exist_ok=True)
        for name, side in zip(("positive", "negative"), sides, strict=True):
            (save / f"{name}.txt").write_text("".join(f"{line}\n" for line in side), "utf-8")
    return sides
