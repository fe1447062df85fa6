"""Commands about the circuits of a study: which features of several layers a task rests on."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from pipelines.commands.shared import as_json, on_device, study_name, work
from sae_core.artifacts import ArtifactStore, home, write_atomically
from sae_core.errors import MindAtlasError


@click.command()
@click.argument("study", default="circuits")
@click.option("--task", default="", help="One of the study's tasks (default: its first).")
@click.option("--limit", default=20, show_default=True, type=click.IntRange(1), help="Nodes and edges shown.")
@click.option("--export", "file", type=click.Path(path_type=Path, dir_okay=False), help="Write it into this file.")
@click.option(
    "--format", "format_", type=click.Choice(["json", "attribution-graph"]), default="json", show_default=True,
    help="What is written: all that is known, or what circuit-tracer and Neuronpedia read.",
)  # fmt: skip
@click.option(
    "--ablate", "nodes", multiple=True, metavar="LAYER:N",
    help="Tell what becomes of the task, and of other text, without this node (LAYER:error: what is missed there); "
    "may be given several times.",
)  # fmt: skip
@on_device
@as_json
@click.pass_obj
def circuit(
    debug: bool, study: str, task: str, limit: int, file: Path | None, format_: str, nodes: tuple[str, ...],
    device: str, json_: bool,
) -> None:  # fmt: skip
    """The circuit of a task of STUDY, made through Dagster unless it is there; or the task without nodes of it."""
    from pipelines.console import print_json
    from pipelines.reports import show_circuit
    from sae_core.circuits.reader import labels_of, read_circuit, read_graph

    if file and nodes:
        raise click.UsageError("--export writes the circuit, --ablate tells of a model without some of it: give one")
    target, wanted = file.absolute() if file else None, [_node(text) for text in nodes]
    slug = make_circuit(debug, study, task, device)
    store = ArtifactStore(home())
    found = read_circuit(store, slug)
    labels = labels_of(store, found)
    if wanted:
        _ablate(store, study, found, labels, wanted, device, json_)
    elif target:
        told = read_graph(store, slug, labels) if format_ == "attribution-graph" else found.as_json(labels)
        with write_atomically(target) as path:
            path.write_text(json.dumps(told, ensure_ascii=False, indent=1), "utf-8")
        click.echo(f"{target}: {len(found.nodes)} nodes, {len(found.edges)} edges")
    elif json_:
        print_json(found.as_json(labels))
    else:
        show_circuit(found, labels, limit)


@click.command()
@click.argument("study", default="circuits")
@click.option(
    "--feature", "features", multiple=True, metavar="LAYER:N",
    help="Take this one out; may be given several times (default: by words of labels).",
)  # fmt: skip
@click.option("--keyword", "keywords", multiple=True, metavar="WORD", help="Take out features whose labels hold it.")
@click.option(
    "--judge", is_flag=True, help="Take out features whose labels the study's label writer finds to be about it."
)
@click.option("--layer", type=int, help="Layer that the probe reads (default: that of the study's middle dictionary).")
@click.option("--each", default=32, show_default=True, type=click.IntRange(4, 1000), help="Texts of each group.")
@as_json
def shift(
    study: str, features: tuple[str, ...], keywords: tuple[str, ...], judge: bool, layer: int | None, each: int,
    json_: bool,
) -> None:  # fmt: skip
    """Take features that should not matter out of a probe with a spurious cue (SHIFT), and measure what that does."""
    from pipelines.console import print_json
    from pipelines.reports import show_shift

    asked = [_numbers(text) for text in features]
    name = study_name(study)
    from assets.partitions import STUDIES
    from sae_core.circuits.judge import about_cue
    from sae_core.circuits.network import Network, places_of
    from sae_core.circuits.reader import labels
    from sae_core.circuits.shift import Shift, load_biographies
    from sae_core.language_model import LanguageModel

    wanted, store = STUDIES.get(name), ArtifactStore(home())
    _check_sites(wanted)
    layers = sorted({one.site.layer for one, _ in wanted.first_trainings})
    last = layers[len(layers) // 2] if layer is None else layer
    if last not in layers:
        raise MindAtlasError(f"no dictionary at layer {last}: there are {', '.join(map(str, layers))}")
    lm = LanguageModel.load(wanted.model, precision="float32")
    network = Network(lm, places_of(store, wanted, lm.device, last))
    corpus = store.get("corpus", wanted.corpus.name).folder
    run = Shift(network, corpus, load_biographies(), each=each)
    keys = [(node.place, node.feature) for node in (*run.circuit, *run.by_cue[:100])]
    names = labels(store, [place.name for place in network.places], keys)
    if asked:
        chosen = {"SHIFT, by hand": run.named(asked)}
    elif judge:
        about, unread = about_cue(run.names_of(names), run.made_of.cues, wanted.labels)
        chosen = {f"SHIFT, by a judge ({unread} without an answer)": run.of_circuit(about)}
    else:
        chosen = {"SHIFT, by labels": run.labeled(names, keywords)}
    count = len(next(iter(chosen.values())))
    chosen["SHIFT, by exchanging the cue"] = [node for node in run.by_cue if node.feature >= 0][:count]
    scores = run.measure(chosen)
    taken = [
        (network.places[n.place].order[0], n, names.get((n.place, n.feature), "")) for n in next(iter(chosen.values()))
    ]
    if json_:
        rows = [{"layer": at, "feature": n.feature, "effect": n.effect, "label": label} for at, n, label in taken]
        print_json({"taken_out": rows, "scores": [score._asdict() for score in scores]})
    else:
        show_shift(taken, scores)


def _ablate(
    store: ArtifactStore, study: str, found: Any, labels: dict[tuple[int, int], str], wanted: list[tuple[int, int]],
    device: str, json_: bool,
) -> None:  # fmt: skip
    """What becomes of a task without nodes, with progress."""
    from assets.partitions import STUDIES
    from assets.resources import Workshop
    from pipelines.console import print_json, progress
    from pipelines.reports import show_edit
    from sae_core.circuits.edit import at_layers, edited
    from sae_core.language_model import LanguageModel

    told, keys = STUDIES.get(study_name(study)), at_layers(found, wanted)

    def load() -> LanguageModel:
        return LanguageModel.load(told.model, Workshop(device=device).torch_device(), "float32")

    with progress() as watch:
        report = watch("ablate")
        for edit in edited(store, told, found.slug, keys, load):
            report(edit.done, edit.total, "passes")
    names = [(found.places[place].layer, feature, labels[place, feature]) for place, feature in keys]
    if json_:
        taken = [{"layer": layer, "feature": feature, "label": label} for layer, feature, label in names]
        print_json({"taken_out": taken, **asdict(edit)})
    else:
        show_edit(names, edit)


def _node(text: str) -> tuple[int, int]:
    """A feature by layer and number, or what the dictionary there misses."""
    from sae_core.circuits.reader import ERROR  # brings the atlas

    layer, _, feature = text.partition(":")
    return (int(layer), ERROR) if layer.isdecimal() and feature == "error" else _numbers(text, "--ablate")


def _numbers(text: str, option: str = "--feature") -> tuple[int, int]:
    layer, _, feature = text.partition(":")
    if not (layer.isdecimal() and feature.isdecimal()):
        raise click.BadParameter(f"{text!r} is no LAYER:N, as 15:1234", param_hint=option)
    return int(layer), int(feature)


def make_circuit(debug: bool, study: str, task: str, device: str) -> str:
    """The name of a task's circuit, which is made if it is not there as the study has it.

    Raises MindAtlasError when the study has no circuits, or none of that task.
    """
    name = study_name(study)
    from assets.partitions import STUDIES
    from assets.resources import Workshop
    from pipelines.run import materialize
    from sae_core.studies import Order

    wanted, workshop = STUDIES.get(name), Workshop(device=device)
    _check_sites(wanted)
    if not wanted.circuits.tasks:
        raise MindAtlasError(f'{name} names no tasks: add [circuits] tasks = ["agreement"] to its file')
    if task and task not in wanted.circuits.tasks:
        raise MindAtlasError(f"{name} has no task {task!r}: it names {', '.join(wanted.circuits.tasks)}")
    slug = wanted.circuit_slug(task or wanted.circuits.tasks[0])
    recipe = Order(wanted, None).recipe("circuit", slug)
    if workshop.store.status(recipe).state != "made":
        with work(debug) as (instance, level):
            materialize("circuit", slug, wanted, workshop, instance, level)
    return slug


def _check_sites(study: Any) -> None:
    if len(study.sites) < 2:
        raise MindAtlasError(
            f"{study.name} has dictionaries at one site, and a circuit wants two or more: give activations.layer as a "
            'list, as [5, 15, 25], and [circuits] tasks = ["agreement"]; `mind-atlas why` works with one'
        )
