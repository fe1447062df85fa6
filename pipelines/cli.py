"""`mind-atlas`: make an atlas, look into it, steer with it.

Commands that make things go through Dagster; commands that look read the artifacts alone. Heavy modules are imported
inside the commands, so that `--help` and a typing error answer at once.
"""

import logging
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from sae_core.artifacts import PROJECT, ArtifactStore, home
from sae_core.errors import MindAtlasError
from sae_core.stages import VERSIONS

Command = Callable[..., Any]
STOPPED = "stopped; what is finished stays, and the same command goes on from there"


def main() -> None:
    """Run the command line; every foreseen failure is one line on standard error, and a status that is not 0."""
    debug = "--debug" in sys.argv
    try:
        cli(standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        _die(STOPPED, 130)
    except BaseException as error:
        if debug or isinstance(error, SystemExit):
            raise
        if type(error).__name__ == "DagsterExecutionInterruptedError":  # what Dagster makes of Ctrl-C in a step
            _die(STOPPED, 130)
        message = _message(error)
        _die(message or f"unexpected {type(error).__name__}: {error!s:.300}; --debug shows where", 1 if message else 70)


def _message(error: BaseException | None) -> str:
    """The line meant for the user, from the error or from what caused it; empty when there is none."""
    seen = []
    while error is not None and error not in seen:  # an exception may be its own cause, in a circle
        if isinstance(error, MindAtlasError):
            return str(error)
        seen.append(error)
        error = error.__cause__ or error.__context__
    return ""


def _die(message: str, status: int) -> None:
    click.echo(f"mind-atlas: {' '.join(message.split())}", err=True)
    sys.exit(status)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.option("--debug", is_flag=True, help="Show tracebacks and Dagster's own log.")
@click.version_option(package_name="mind-atlas")
@click.pass_context
def cli(context: click.Context, debug: bool) -> None:
    """A labeled, searchable, steerable atlas of the features inside a language model.

    Start with `mind-atlas run`; then `mind-atlas features "some words"`.
    """
    context.obj = debug
    for name in ("MIND_ATLAS_HOME", "MIND_ATLAS_CACHE", "DAGSTER_HOME"):  # `run` and `ui` change the folder
        if os.environ.get(name):
            os.environ[name] = str(Path(os.environ[name]).expanduser().absolute())
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads stall on a busy machine
    if not debug:
        warnings.filterwarnings("ignore")
        logging.disable(logging.WARNING)
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def as_json(command: Command) -> Command:
    """Add `--json`."""
    return click.option("--json", "json_", is_flag=True, help="Print one JSON document for machines.")(command)


def chosen(command: Command) -> Command:
    """Add `--study` and `--dictionary`; without them, the newest finished dictionary is meant."""
    command = click.option("--dictionary", default="", help="Name of a dictionary (default: the newest).")(command)
    return click.option("--study", default="", help="Study whose first dictionary is meant.")(command)


@cli.command()
@click.argument("study", default="quickstart")
@click.option("--device", default="auto", help="cpu, cuda, cuda:1; auto takes a CUDA device when there is one.")
@click.option(
    "--until", type=click.Choice(list(VERSIONS)), default="labels", show_default=True, help="Make no stage after this."
)
@as_json
@click.pass_obj
def run(debug: bool, study: str, device: str, until: str, json_: bool) -> None:
    """Make everything STUDY asks for that is missing or stale: a shipped study's name, or the path of a study file."""
    name = _register(study)
    os.environ.setdefault("DAGSTER_HOME", str(PROJECT))
    if Path(os.environ["DAGSTER_HOME"]) == PROJECT:
        os.chdir(PROJECT)  # dagster.yaml's paths are seen from the project's folder

    import dagster as dg

    from assets.partitions import STUDIES
    from assets.resources import Workshop
    from pipelines.console import err, progress
    from pipelines.run import bring_up_to_date
    from pipelines.summary import show, summarize

    wanted, workshop = STUDIES.get(name), Workshop(device=device)
    level = "DEBUG" if debug else "CRITICAL"
    with dg.DagsterInstance.get() as instance, progress():
        for recipe, status in bring_up_to_date(wanted, workshop, instance, until=until, log_level=level):
            was = "cached" if status.state == "made" else f"made ({status.why})"
            err.print(f"{recipe.stage:<12} {recipe.slug}: {was}", markup=False)
    if until == "labels":
        show(summarize(wanted, workshop.store), json_)


@cli.command()
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


@cli.command()
@click.argument("study", default="quickstart")
@as_json
def status(study: str, json_: bool) -> None:
    """For each stage of STUDY: made, stale or missing, and why."""
    name = _register(study)
    from assets.partitions import STUDIES
    from pipelines.console import out, print_json, table
    from pipelines.run import plan

    steps = plan(STUDIES.get(name), ArtifactStore(home()))
    rows = [(s.recipe.stage, s.status.state, s.recipe.slug, s.status.why) for s in steps]
    if json_:
        print_json([dict(zip(("stage", "state", "slug", "why"), row, strict=True)) for row in rows])
    else:
        out.print(table(("stage", "state", "name", "why"), rows))


@cli.command()
@click.argument("words", nargs=-1, required=True)
@click.option("--limit", default=10, show_default=True, type=click.IntRange(1))
@chosen
@as_json
def features(words: tuple[str, ...], limit: int, study: str, dictionary: str, json_: bool) -> None:
    """Find features by WORDS in their labels, examples and promoted tokens."""
    from pipelines.console import out, print_json, table

    atlas = _atlas(study, dictionary)
    hits = atlas.search(" ".join(words), limit)
    if json_:
        print_json(hits)
    elif hits:
        rows = [(h.feature, h.label, h.score, h.density, h.why) for h in hits]
        out.print(table(("feature", "label", "score", "density", "found in"), rows))
    else:
        out.print("nothing found: try fewer or other words", markup=False)


@cli.command()
@click.argument("number", type=int)
@click.option("--examples", default=8, show_default=True, type=click.IntRange(0), help="Examples shown.")
@chosen
@as_json
def feature(number: int, examples: int, study: str, dictionary: str, json_: bool) -> None:
    """Feature NUMBER: its label, how often it fires and on what, what it promotes, and its neighbors."""
    from pipelines.console import print_json
    from pipelines.summary import show_feature

    card = _atlas(study, dictionary).feature(number)
    print_json(card) if json_ else show_feature(card, examples)


@cli.command()
@click.argument("text")
@click.option("--top", default=5, show_default=True, type=click.IntRange(1), help="Features shown for each token.")
@chosen
@as_json
def explain(text: str, top: int, study: str, dictionary: str, json_: bool) -> None:
    """Which features fire on TEXT, token by token."""
    from pipelines.console import out, print_json, table

    atlas = _atlas(study, dictionary)
    tokens = atlas.explain(_model(atlas), text, top)
    if json_:
        print_json(tokens)
        return
    for token in tokens:
        out.print(f"\n{token.token!r}", style="bold", markup=False)
        out.print(table(("feature", "activation", "label"), [(f.feature, f.value, f.label) for f in token.features]))


@cli.command()
@click.argument("prompt")
@click.option(
    "--feature", "clamps", multiple=True, required=True, metavar="N=STRENGTH",
    help="Clamp feature N to STRENGTH times its maximum over the corpus; may be given several times.",
)  # fmt: skip
@click.option("--max-tokens", default=60, show_default=True, type=click.IntRange(1))
@click.option("--temperature", default=0.0, show_default=True, type=click.FloatRange(0))
@click.option("--seed", default=0, show_default=True, help="Seed of both answers.")
@chosen
@as_json
def steer(
    prompt: str, clamps: tuple[str, ...], max_tokens: int, temperature: float, seed: int,
    study: str, dictionary: str, json_: bool,
) -> None:  # fmt: skip
    """The model's answer to PROMPT as it is, and with features clamped."""
    wanted = [_clamp(text) for text in clamps]  # first of all: a typing error is answered at once
    from pipelines.console import print_json
    from pipelines.summary import show_side_by_side
    from sae_core.steering import Clamp, atlas_edit, default_and_steered

    atlas = _atlas(study, dictionary)
    edit = atlas_edit(atlas, [Clamp(*pair) for pair in wanted])
    turns = [{"role": "user", "content": prompt}]
    answers = default_and_steered(_model(atlas), atlas.site, edit, turns, max_tokens, temperature, seed)
    told = [{"feature": i, "strength": strength, "label": atlas.name(i)} for i, strength in wanted]
    found = {"prompt": prompt, **answers._asdict(), "clamps": told}
    print_json(found) if json_ else show_side_by_side(found)


@cli.command()
@click.option("--positive", "positive_file", type=click.Path(path_type=Path), help="Prompts, one a line, or JSONL.")
@click.option("--negative", "negative_file", type=click.Path(path_type=Path), help="The same, of the other kind.")
@click.option("--positive-text", multiple=True, metavar="TEXT", help="One positive; may be given several times.")
@click.option("--negative-text", multiple=True, metavar="TEXT", help="One negative.")
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
    negative_text: tuple[str, ...], prompt: str, direction: str | None, limit: int,
    study: str, dictionary: str, json_: bool,
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
    if prompt and any(sides):
        raise click.UsageError("give either --prompt or two sets of prompts")
    sets = None if prompt else by.split_prompts(sides[0], sides[1])
    atlas = _atlas(study, dictionary)
    reader = PromptReader.of(atlas, _model(atlas))
    if sets is None:
        on_prompt = by.by_prompt(atlas, reader, prompt, limit)
        print_json([row._asdict() for row in on_prompt]) if json_ else show_rows(on_prompt)
    elif direction:
        raw = [reader.pool(side).raw for side in sides]
        near = by.nearest(atlas, reader, by.direction(raw[0], raw[1], direction), limit)  # type: ignore[arg-type]
        print_json([row._asdict() for row in near]) if json_ else show_rows(near)
    else:
        found = by.contrast(atlas, reader, sets, limit)
        print_json(found) if json_ else show_contrast(found)


@cli.command()
@click.argument("study", default="quickstart")
@click.option("--concepts", type=click.Path(path_type=Path), help="Folder of concept files of your own.")
@click.option("--only", multiple=True, metavar="NAME", help="Audit this concept; may be given several times.")
@click.option("--device", default="auto", help="cpu, cuda, cuda:1; auto takes a CUDA device when there is one.")
@click.option("--into", type=click.Path(path_type=Path), help="Put the report into this Markdown file, at its marks.")
@as_json
@click.pass_obj
def audit(
    debug: bool, study: str, concepts: Path | None, only: tuple[str, ...], device: str, into: Path | None, json_: bool
) -> None:
    """Which features of STUDY's dictionary stand for the concepts of the safety catalog, and how far to trust them."""
    changes: dict[str, Any] = {"folder": str(concepts.expanduser().absolute())} if concepts else {}
    _report(debug, study, device, "safety", changes | ({"concepts": list(only)} if only else {}), into, json_)


@cli.command()
@click.argument("study", default="quickstart")
@click.option("--device", default="auto", help="cpu, cuda, cuda:1; auto takes a CUDA device when there is one.")
@click.option("--into", type=click.Path(path_type=Path), help="Put the report into this Markdown file, at its marks.")
@as_json
@click.pass_obj
def multilingual(debug: bool, study: str, device: str, into: Path | None, json_: bool) -> None:
    """Which features of STUDY's dictionary fire on the same content in several languages, against shuffled pairs."""
    _report(debug, study, device, "multilingual", {}, into, json_)


@cli.command()
@click.argument("file", type=click.File("rb"), default="-")
@click.option("--concept", "concepts", multiple=True, metavar="NAME", help="Watch for this one (default: all).")
@click.option(
    "--false-positive-rate", "rate", default=0.05, show_default=True,
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
)  # fmt: skip
@click.option(
    "--base-rate", default=0.5, show_default=True, type=click.FloatRange(0, 1, min_open=True, max_open=True),
    help="Share of texts that are about a concept, for the probabilities.",
)  # fmt: skip
@click.option("--batch", default=1, show_default=True, type=click.IntRange(1), help="Lines read before an answer.")
@chosen
def monitor(
    file: Any, concepts: tuple[str, ...], rate: float, base_rate: float, batch: int, study: str, dictionary: str
) -> None:
    """Read texts or chats from FILE (standard input), one a line, and print each alert as a line of JSON.

    A line is plain text, or JSON with `text` or `messages`. Thresholds come from the audit of the dictionary.
    """
    from pipelines.reports import watch
    from sae_core.prompt_reader import PromptReader
    from sae_core.safety.monitor import MONITOR, Monitor, load_detectors

    atlas = _atlas(study, dictionary)
    detectors = load_detectors(atlas.store.get("safety", atlas.dictionary).folder / MONITOR, concepts)
    reader = PromptReader.of(atlas, _model(atlas, as_harvested=True))
    watch(Monitor(reader, detectors, rate, base_rate), file, batch)


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--format", "format_", required=True, type=click.Choice(["saelens", "dictionary_learning", "sparsify"]),
    help="The library that is to read it.",
)  # fmt: skip
@chosen
@as_json
def export(folder: Path, format_: str, study: str, dictionary: str, json_: bool) -> None:
    """Write a dictionary into the new folder FOLDER, in another library's format."""
    from pipelines.console import out, print_json
    from sae_core import interop

    atlas = _atlas(study, dictionary)
    interop.write(atlas.load_dictionary(), folder, format_, atlas.site)
    written = {"dictionary": atlas.dictionary, "format": format_, "folder": str(folder.absolute())}
    if json_:
        print_json(written)
    else:
        out.print(f"{atlas.dictionary} is in {written['folder']}, as {format_} reads it", markup=False)


@cli.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=3000, show_default=True)
def ui(host: str, port: int) -> None:
    """Dagster's web UI on this project: materialize, watch, schedule."""
    os.environ.setdefault("DAGSTER_HOME", str(PROJECT))
    os.chdir(PROJECT)
    program = str(Path(sys.executable).with_name("dagster"))
    os.execv(program, [program, "dev", "-m", "pipelines.definitions", "-h", host, "-p", str(port)])


def _register(study: str) -> str:
    """The study's name; a study file elsewhere is linked into the home folder, so that Dagster's UI knows it too.

    Raises:
        StudyError: the file is no study, or does not go together with those that are known; it is not linked then.
    """
    if not study.endswith(".toml"):
        return study
    from sae_core.studies import Studies, study_folders
    from sae_core.study_files import load_study

    path = Path(study).expanduser().resolve()
    own = load_study(path)
    files = {file.stem: file.resolve() for folder in study_folders() for file in folder.glob("*.toml")}
    if files.get(own.name, path) != path and files[own.name].is_file():
        raise MindAtlasError(f"another study is called {own.name} ({files[own.name]}): rename {path.name}")
    Studies([*(s for s in Studies.load(*study_folders()) if s.name != own.name), own])  # do they go together?
    link = home() / "studies" / f"{own.name}.toml"
    if files.get(own.name) != path:
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)  # it leads nowhere
        link.symlink_to(path)
    return own.name


def _atlas(study: str, dictionary: str) -> Any:
    """The atlas that `--study` and `--dictionary` mean."""
    from sae_core.atlas import Atlas

    if study and not dictionary:
        name = _register(study)
        from assets.partitions import STUDIES

        wanted = STUDIES.get(name)
        dictionary = wanted.spec(wanted.dictionaries[0]).slug
    return Atlas.open(ArtifactStore(home()), dictionary)


def _model(atlas: Any, as_harvested: bool = False) -> Any:
    """The language model that an atlas describes; in float32, or in the precision of its activations."""
    from assets.partitions import STUDIES
    from sae_core.language_model import LanguageModel

    study = STUDIES.order(atlas.dictionary).study
    return LanguageModel.load(study.model, precision=study.activations.precision if as_harvested else "float32")


def _report(
    debug: bool, study: str, device: str, stage: str, changes: dict[str, Any], into: Path | None, json_: bool
) -> None:
    """Make a report of a study's first dictionary through Dagster, unless it is there, and show it."""
    name, target = _register(study), into.absolute() if into else None
    os.environ.setdefault("DAGSTER_HOME", str(PROJECT))
    if Path(os.environ["DAGSTER_HOME"]) == PROJECT:
        os.chdir(PROJECT)

    import dagster as dg

    from assets.partitions import STUDIES
    from assets.resources import Workshop
    from pipelines.console import progress
    from pipelines.reports import insert, show_report
    from pipelines.run import make
    from sae_core.studies import Order

    wanted, workshop = STUDIES.get(name), Workshop(device=device)
    slug = wanted.spec(wanted.dictionaries[0]).slug
    recipe = Order(wanted, wanted.dictionaries[0]).override(stage, changes).recipe(stage, slug)
    with dg.DagsterInstance.get() as instance, progress():
        if workshop.store.status(recipe).state != "made":
            make(recipe, wanted, workshop, instance, "DEBUG" if debug else "CRITICAL", changes)
    made = workshop.store.get(stage, slug)
    if target:
        insert(made, target)
    show_report(made, json_)


def _clamp(text: str) -> tuple[int, float]:
    number, equals, strength = text.partition("=")
    try:
        return int(number), float(strength if equals else "nothing")
    except ValueError:
        raise click.BadParameter(f"{text!r}: write NUMBER=STRENGTH, as in 1234=10", param_hint="--feature") from None


if __name__ == "__main__":
    main()
