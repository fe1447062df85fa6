"""`mind-atlas label` for the server: in a process of its own, whose progress is told as lines of JSON."""

import json
import sys
from collections.abc import Sequence

import click

from sae_core.progress import Report


def command(dictionary: str, features: Sequence[int]) -> list[str]:
    """What labels features of a dictionary and tells its progress, see `sae_core.serve.labeling`."""
    chosen = [argument for feature in features for argument in ("--feature", str(feature))]
    return [sys.executable, "-m", "pipelines.labeling", "label", "--dictionary", dictionary, *chosen, "--json"]


def main() -> None:
    """Run the command line, with progress on standard output as well."""
    from assets.resources import watchers
    from pipelines import cli

    watchers.append(_watch)
    cli.main()


def _watch(stage: str) -> Report:
    def report(done: int, total: int, unit: str, **values: float) -> None:
        click.echo(json.dumps({"done": done, "total": total, "unit": unit}))

    return report


if __name__ == "__main__":
    main()
