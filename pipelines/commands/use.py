"""Commands that use an atlas: to steer the model, to watch texts, in another program."""

from pathlib import Path
from typing import Any

import click

from pipelines.commands.shared import as_json, chosen, open_atlas, open_model


@click.command()
@click.argument("prompt")
@click.option(
    "--feature", "features", multiple=True, required=True, metavar="N[=STRENGTH]",
    help="Steer feature N with STRENGTH, or as far as texts stay fluent; may be given several times.",
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

    atlas = open_atlas(study, dictionary)
    Steering.of(atlas, [Steer(number, strength or 0.0, method) for number, strength in wanted], scope)  # or refuses
    lm = open_model(atlas)
    steers = [Steer(n, _fluent(atlas, lm, n) if strength is None else strength, method) for n, strength in wanted]
    steering, notes = Steering.of(atlas, steers, scope), cautions(atlas, steers)
    if not lm.tokenizer.chat_template:
        notes.append("the model has no chat template: it completes the prompt as plain text")
    for note in notes:
        err.print(f"note: {note}", markup=False)
    sampling = Sampling(max_tokens, temperature, top_p, seed, stop)
    streams = side_by_side(lm, read_prompt(lm, [{"role": "user", "content": prompt}]), sampling, steering)
    told = [
        {**s._asdict(), "label": atlas.name(s.feature), "beats_control": atlas.beats_control(s.feature)} for s in steers
    ]
    if not json_:
        show_side_by_side(streams, told)
        return
    tokens: dict[str, list[Any]] = {"default": [], "steered": []}
    for name, token in streams:
        tokens[name].append(token._asdict())
    answers = {name: "".join(token["text"] for token in said) for name, said in tokens.items()}
    print_json({"prompt": prompt, **answers, "steering": told, "scope": scope, "notes": notes, "tokens": tokens})


@click.command()
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
    from sae_core.safety.monitor import Monitor, detectors_of

    atlas = open_atlas(study, dictionary)
    detectors = detectors_of(atlas, concepts)
    reader = PromptReader.of(atlas, open_model(atlas, as_harvested=True))
    watch(Monitor(reader, detectors, rate, base_rate), file, batch)


@click.command()
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
    atlas = open_atlas(study, dictionary)
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


def _strength(text: str) -> tuple[int, float | None]:
    """A feature, and its strength if one is given."""
    number, equals, strength = text.partition("=")
    try:
        return int(number), float(strength) if equals else None
    except ValueError:
        raise click.BadParameter(f"{text!r}: write NUMBER=STRENGTH, as in 1234=10", param_hint="--feature") from None


def _fluent(atlas: Any, lm: Any, feature: int) -> float:
    """The strength up to which a feature's texts are fluent, as it was found, or is now; the least tried if none is."""
    from assets.partitions import STUDIES
    from pipelines.console import err
    from sae_core.steering_scores import search_strength
    from sae_core.steering_texts import Subject

    settings = STUDIES.order(atlas.dictionary).study.steering
    found = atlas.suggested_strength(feature)
    if found is None:
        err.print(f"looking for a strength for feature {feature} ...", markup=False)
        *_, found = search_strength(Subject.of(atlas, lm), feature, settings)
    told = f"texts were fluent up to {found:g} times its maximum" if found else "texts were not fluent at any strength"
    err.print(f"feature {feature}: {told}", markup=False)
    return found or min(settings.strengths)
