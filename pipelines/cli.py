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

from sae_core.artifacts import ATLAS, PROJECT, ArtifactStore, home
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
    "--until", type=click.Choice(list(VERSIONS)), default=ATLAS, show_default=True, help="Make no stage after this."
)
@click.option("--workers", default=0, type=click.IntRange(0), help="Processes that read activations at once.")
@click.option("--ray", default="", metavar="ADDRESS", help="Read activations on a Ray cluster: auto, ray://host:10001.")
@as_json
@click.pass_obj
def run(debug: bool, study: str, device: str, until: str, workers: int, ray: str, json_: bool) -> None:
    """Make everything STUDY asks for that is missing or stale: a shipped study's name, or the path of a study file."""
    wanted = _bring_up_to_date(debug, _register(study), until, device=device, workers=workers, ray=ray)
    if until == ATLAS:
        from pipelines.summary import show, summarize

        show(summarize(wanted, ArtifactStore(home())), json_)


@cli.command()
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
    atlas = _atlas(study, dictionary)
    from assets.partitions import STUDIES
    from pipelines.summary import show_estimate, show_labels

    order = STUDIES.order(atlas.dictionary, _register(study) if study else None)
    if dry_run:
        from sae_core.labels.estimate import estimate_labels

        folder = atlas.store.get("features", atlas.dictionary).folder
        show_estimate(order.study.labels, estimate_labels(order.study.labels, folder, numbers), json_)
        return
    _settle()
    import dagster as dg

    from assets.resources import Workshop
    from pipelines.console import progress
    from pipelines.run import materialize
    from sae_core.labels import Labels

    level, workshop = "DEBUG" if debug else "CRITICAL", Workshop()
    with dg.DagsterInstance.get() as instance, progress():
        materialize("labels", atlas.dictionary, order.study, workshop, instance, level, only=list(numbers))
    labels = Labels.open(atlas.store.get("labels", atlas.dictionary).folder)
    show_labels([labels.label(number) for number in dict.fromkeys(numbers)], json_)


@cli.command()
@click.option("--device", default="auto", help="cpu, cuda, cuda:1; auto takes a CUDA device when there is one.")
@click.pass_obj
def refresh(debug: bool, device: str) -> None:
    """Make again what is stale in every study that was built; what the schedules do, by hand."""
    _settle()
    from assets.partitions import STUDIES
    from pipelines.jobs import is_built

    built = [study.name for study in STUDIES if is_built(study, ArtifactStore(home()))]
    if not built:
        raise MindAtlasError("no study was built yet: `mind-atlas run` builds one")
    failed = {}
    for name in built:
        try:
            _bring_up_to_date(debug, name, ATLAS, device=device)
        except Exception as error:
            if not (message := _message(error)):
                raise
            failed[name] = message
    if failed:
        raise MindAtlasError("; ".join(f"{name}: {message}" for name, message in failed.items()))


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
@click.option("--study", default="", help="Only what this study asks for; otherwise everything that is finished.")
@click.option("--repair", is_flag=True, help="Remove damaged files, so that the next run makes these again.")
@as_json
def verify(study: str, repair: bool, json_: bool) -> None:
    """Read everything made to the last byte and compare checksums; the exit status is 1 if something is damaged."""
    from sae_core.verify import verify as check

    keys = []
    if study:
        name = _register(study)
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


@cli.command()
@click.argument("words", nargs=-1, required=True)
@click.option("--limit", default=10, show_default=True, type=click.IntRange(1))
@chosen
@as_json
def features(words: tuple[str, ...], limit: int, study: str, dictionary: str, json_: bool) -> None:
    """Find features by WORDS in their labels, examples and promoted tokens."""
    from pipelines.console import doubted, out, print_json, table

    atlas = _atlas(study, dictionary)
    hits = atlas.search(" ".join(words), limit)
    if json_:
        print_json(hits)
    elif hits:
        rows = [(h.feature, doubted(h.label, h.beats_control), h.score, h.density, h.why) for h in hits]
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
    "--feature", "features", multiple=True, required=True, metavar="N=STRENGTH",
    help="Steer feature N with STRENGTH; may be given several times.",
)  # fmt: skip
@click.option(
    "--method", type=click.Choice(["clamp", "add", "scale", "min_clamp"]), default="clamp", show_default=True,
    help="Strength is in maxima of the feature over the corpus: hold it there, add that, keep it at least there; "
    "or, with scale, what its activation is multiplied by.",
)  # fmt: skip
@click.option(
    "--scope", type=click.Choice(["all", "generated", "last_turn", "no_special"]), default="all", show_default=True,
    help="Positions that are steered.",
)  # fmt: skip
@click.option("--max-tokens", default=60, show_default=True, type=click.IntRange(1))
@click.option("--temperature", default=0.0, show_default=True, type=click.FloatRange(0))
@click.option("--top-p", default=1.0, show_default=True, type=click.FloatRange(0, 1, min_open=True))
@click.option("--seed", default=0, show_default=True, help="Seed of both answers.")
@click.option("--stop", multiple=True, help="Text that ends an answer; may be given several times.")
@chosen
@as_json
def steer(
    prompt: str, features: tuple[str, ...], method: Any, scope: Any, max_tokens: int, temperature: float,
    top_p: float, seed: int, stop: tuple[str, ...], study: str, dictionary: str, json_: bool,
) -> None:  # fmt: skip
    """The model's answer to PROMPT as it is, and with features steered, side by side."""
    wanted = [_strength(text) for text in features]  # first of all: a typing error is answered at once
    from pipelines.console import err, print_json
    from pipelines.summary import show_side_by_side
    from sae_core.generation import Sampling, read_prompt, side_by_side
    from sae_core.steering import Steer, Steering, cautions

    atlas = _atlas(study, dictionary)
    steers = [Steer(number, strength, method) for number, strength in wanted]
    steering = Steering.of(atlas, steers, scope)
    lm = _model(atlas)
    notes = cautions(atlas, steers)
    if not lm.tokenizer.chat_template:
        notes.append("the model has no chat template: it completes the prompt as plain text")
    for note in notes:
        err.print(f"note: {note}", markup=False)
    sampling = Sampling(max_tokens, temperature, top_p, seed, stop)
    streams = side_by_side(lm, read_prompt(lm, [{"role": "user", "content": prompt}]), sampling, steering)
    told = [{**steer._asdict(), "label": atlas.name(steer.feature)} for steer in steers]
    if not json_:
        show_side_by_side(streams, told)
        return
    tokens: dict[str, list[Any]] = {"default": [], "steered": []}
    for name, token in streams:
        tokens[name].append(token._asdict())
    answers = {name: "".join(token["text"] for token in said) for name, said in tokens.items()}
    print_json({"prompt": prompt, **answers, "steering": told, "scope": scope, "notes": notes, "tokens": tokens})


@cli.command()
@click.argument("study", default="quickstart")
@click.option("--device", default="auto", help="cpu, cuda, cuda:1; auto takes a CUDA device when there is one.")
@as_json
@click.pass_obj
def steering_report(debug: bool, study: str, device: str, json_: bool) -> None:
    """What steering with STUDY's features does to texts, measured against four controls."""
    from pipelines.console import print_json
    from sae_core.steering_report import MARKDOWN, read_report

    folder = _make_report(debug, study, device, "steering_report", {}).folder
    if json_:
        print_json([row._asdict() for row in read_report(folder)])
    else:
        click.echo((folder / MARKDOWN).read_text("utf-8"), nl=False)


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
    store = ArtifactStore(home())  # reports are no part of what is promoted
    if store.manifest("safety", atlas.dictionary) is None:
        raise MindAtlasError(f"no audit of {atlas.dictionary} has set thresholds: `mind-atlas audit` does")
    detectors = load_detectors(store.get("safety", atlas.dictionary).folder / MONITOR, concepts)
    reader = PromptReader.of(atlas, _model(atlas, as_harvested=True))
    watch(Monitor(reader, detectors, rate, base_rate), file, batch)


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--format",
    "format_",
    required=True,
    help="What is to read it.",
    type=click.Choice(["saelens", "dictionary_learning", "sparsify", "neuronpedia", "site"]),
)
@click.option("--limit", type=click.IntRange(1), help="Features of a site, labeled ones first (default: all).")
@chosen
@as_json
def export(folder: Path, format_: str, limit: int | None, study: str, dictionary: str, json_: bool) -> None:
    """Write into the new folder FOLDER: a dictionary for another library, an atlas for Neuronpedia, or a web site."""
    from pipelines.console import out, print_json
    from sae_core import interop

    if limit is not None and format_ != "site":
        raise click.BadParameter("only a site is limited", param_hint="--limit")
    atlas = _atlas(study, dictionary)
    told = {"dictionary": atlas.dictionary, "format": format_, "folder": str(folder.absolute())}
    if format_ == "site":
        from pipelines.console import progress
        from sae_core.serve.site import write_site

        with progress() as watch:
            told |= write_site(atlas.store, atlas.dictionary, folder, limit, watch("site"))
    elif format_ == "neuronpedia":
        from sae_core.interop import neuronpedia

        told["folder"] = str(neuronpedia.write(atlas, folder).absolute())
    else:
        interop.write(atlas.load_dictionary(), folder, format_, atlas.site)
    if json_:
        print_json(told)
    else:
        out.print(f"{atlas.dictionary} is in {told['folder']}, as {format_}", markup=False)


@cli.command()
@chosen
def rollback(study: str, dictionary: str) -> None:
    """Serve the generation before the one that is served, and promote the latter no more."""
    from pipelines.console import out
    from sae_core.atlas import write_views
    from sae_core.generations import roll_back

    name = _atlas(study, dictionary).dictionary
    generation = roll_back(store := ArtifactStore(home()), name)
    write_views(store)
    out.print(f"{name}: generation {generation.number} is served", markup=False)


@cli.command()
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


@cli.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=7860, show_default=True, type=click.IntRange(0, 65535))
@click.option("--expose", is_flag=True, help="Let other machines in, each with the token MIND_ATLAS_TOKEN.")
@click.option(
    "--steered",
    multiple=True,
    metavar="NAME=FEATURE:STRENGTH",
    help="A steered model for clients of OpenAI's API, besides those of steered.toml; may be given several times.",
)
@chosen
def serve(host: str, port: int, expose: bool, steered: tuple[str, ...], study: str, dictionary: str) -> None:
    """The atlas in the browser: feature pages, search, own texts, steering; a JSON API and one like OpenAI's."""
    from pipelines.serving import serve

    serve(_atlas(study, dictionary).dictionary if study or dictionary else "", host, port, expose, steered)


@cli.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=3000, show_default=True)
def ui(host: str, port: int) -> None:
    """Dagster's web UI on this project: materialize, watch, schedule."""
    os.environ.setdefault("DAGSTER_HOME", str(PROJECT))
    os.chdir(PROJECT)
    program = str(Path(sys.executable).with_name("dagster"))
    os.execv(program, [program, "dev", "-m", "pipelines.definitions", "-h", host, "-p", str(port)])


def _settle() -> None:
    """Where Dagster keeps its runs: DAGSTER_HOME, or the project's folder."""
    os.environ.setdefault("DAGSTER_HOME", str(PROJECT))
    if Path(os.environ["DAGSTER_HOME"]) == PROJECT:
        os.chdir(PROJECT)  # dagster.yaml's paths are seen from the project's folder


def _bring_up_to_date(debug: bool, name: str, until: str, **machine: Any) -> Any:
    """Make what a study's stages lack, up to one of them, with progress; returns the study."""
    _settle()
    import dagster as dg

    from assets.partitions import STUDIES
    from assets.resources import Workshop
    from pipelines.console import err, progress
    from pipelines.run import bring_up_to_date

    said = {"made": "cached", "refused": "refused"}
    wanted, workshop, level = STUDIES.get(name), Workshop(**machine), "DEBUG" if debug else "CRITICAL"
    with dg.DagsterInstance.get() as instance, progress():
        for recipe, status in bring_up_to_date(wanted, workshop, instance, until=until, log_level=level):
            was = f"{said.get(status.state, 'made')}{f' ({status.why})' if status.why else ''}"
            err.print(f"{recipe.stage:<12} {recipe.slug}: {was}", markup=False)
    return wanted


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
    """Make a report, and show it, or put it into a page."""
    from pipelines.reports import insert, show_report

    target = into.absolute() if into else None
    made = _make_report(debug, study, device, stage, changes)
    if target:
        insert(made, target)
    show_report(made, json_)


def _make_report(debug: bool, study: str, device: str, stage: str, changes: dict[str, Any]) -> Any:
    """A report of a study's first dictionary, made through Dagster unless it is there."""
    name = _register(study)
    _settle()
    import dagster as dg

    from assets.partitions import STUDIES
    from assets.resources import Workshop
    from pipelines.console import progress
    from pipelines.run import materialize
    from sae_core.studies import Order

    wanted, workshop = STUDIES.get(name), Workshop(device=device)
    slug = wanted.spec(wanted.dictionaries[0]).slug
    recipe = Order(wanted, wanted.dictionaries[0]).override(stage, changes).recipe(stage, slug)
    with dg.DagsterInstance.get() as instance, progress():
        if workshop.store.status(recipe).state != "made":
            materialize(stage, slug, wanted, workshop, instance, "DEBUG" if debug else "CRITICAL", **changes)
    return workshop.store.get(stage, slug)


def _strength(text: str) -> tuple[int, float]:
    number, equals, strength = text.partition("=")
    try:
        return int(number), float(strength if equals else "nothing")
    except ValueError:
        raise click.BadParameter(f"{text!r}: write NUMBER=STRENGTH, as in 1234=10", param_hint="--feature") from None


if __name__ == "__main__":
    main()
