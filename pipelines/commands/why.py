"""The command that says why a model says what it says."""

import click

from pipelines.commands.shared import as_json, chosen, open_atlas, open_model


@click.command()
@click.argument("prompt")
@click.option("--target", default="", help='The token it is about, as in " Sacramento" (default: the likeliest).')
@click.option("--against", default="", help="The token it is held against (default: the likeliest other).")
@click.option("--compare", default="", metavar="PROMPT", help="A second prompt: which features stay, which change.")
@click.option("--limit", default=10, show_default=True, type=click.IntRange(1, 200), help="Features shown and ablated.")
@click.option(
    "--integrated", "steps", default=0, metavar="STEPS", type=click.IntRange(0, 256),
    help="Integrate gradients from an empty site, in so many steps (default: the gradient where the model is).",
)  # fmt: skip
@chosen
@as_json
def why(
    prompt: str, target: str, against: str, compare: str, limit: int, steps: int, study: str, dictionary: str,
    json_: bool,
) -> None:  # fmt: skip
    """Which features made the model prefer one token to another after PROMPT; the largest are checked by ablation."""
    from pipelines.console import print_json
    from pipelines.reports import show_answer
    from sae_core.circuits.answer import Question, answer
    from sae_core.prompt_reader import PromptReader

    atlas = open_atlas(study, dictionary)
    reader = PromptReader.of(atlas, open_model(atlas))
    found = answer(atlas, reader, Question(prompt, target, against, compare, limit, steps))
    print_json(found) if json_ else show_answer(found)
