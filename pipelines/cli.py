"""`mind-atlas`: make an atlas, look into it, steer with it.

Commands that make things go through Dagster; commands that look read the artifacts alone. Heavy modules are imported
inside the commands, so that `--help` and a typing error answer at once.
"""

import logging
import os
import sys
import warnings
from pathlib import Path

import click

from pipelines.commands import circuits, keep, look, make, report, science, serve, use, why
from sae_core.errors import message_of

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
        message = message_of(error)
        _die(message or f"unexpected {type(error).__name__}: {error!s:.300}; --debug shows where", 1 if message else 70)


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
    if not debug:
        warnings.filterwarnings("ignore")
        logging.disable(logging.WARNING)
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


for module in (make, look, why, circuits, use, report, science, keep, serve):
    for command in vars(module).values():
        if isinstance(command, click.Command):
            cli.add_command(command)


if __name__ == "__main__":
    main()
