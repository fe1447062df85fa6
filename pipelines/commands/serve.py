"""Commands that open a page in the browser: the atlas's own, and Dagster's."""

import os
import sys
from pathlib import Path

import click

from pipelines.commands.shared import chosen, open_atlas
from sae_core.artifacts import PROJECT


@click.command()
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

    serve(open_atlas(study, dictionary).dictionary if study or dictionary else "", host, port, expose, steered)


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=3000, show_default=True)
def ui(host: str, port: int) -> None:
    """Dagster's web UI on this project: materialize, watch, schedule."""
    os.environ.setdefault("DAGSTER_HOME", str(PROJECT))
    os.chdir(PROJECT)
    program = str(Path(sys.executable).with_name("dagster"))
    os.execv(program, [program, "dev", "-m", "pipelines.definitions", "-h", host, "-p", str(port)])
