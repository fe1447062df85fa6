"""How the command line looks: progress bars, tables, highlighted examples. Nothing here computes."""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, is_dataclass
from typing import Any

import click
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from assets.resources import LOG_SECONDS, watchers
from sae_core.progress import Report, now_and_then

out = Console(highlight=False, emoji=False)
err = Console(stderr=True, highlight=False, emoji=False)
if not out.is_terminal:
    out.width = err.width = 200  # a pipe or a file has no width; lines folded at 80 would be hard to search

_HEAT = ("", "on #3d2a1a", "on #6b3f1d", "on #a4551f", "bold black on #e8823a")
"""Backgrounds by activation: from nothing to the feature's maximum, in one hue whose lightness rises evenly."""


def print_json(value: Any) -> None:
    """One JSON document on standard output, and nothing else."""
    click.echo(json.dumps(value, ensure_ascii=False, indent=1, default=_plain))


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return asdict(value)
    return str(value)


class _Rate(ProgressColumn):
    """Units a second."""

    def render(self, task: Any) -> Text:
        return Text(f"{task.speed:,.0f} {task.fields['unit']}/s" if task.speed else "")


@contextmanager
def progress() -> Iterator[Callable[[str], Report]]:
    """While inside, stages that run show their rate and the time left on standard error: a bar, or lines in a file.

    Yields what does so for work that is no stage.
    """
    with _bars() if err.is_terminal else nullcontext(_lines) as watch:
        watchers.append(watch)
        try:
            yield watch
        finally:
            watchers.remove(watch)


def _lines(stage: str) -> Report:
    return now_and_then(lambda line: err.print(f"{stage:<12} {line}", soft_wrap=True), LOG_SECONDS)


@contextmanager
def _bars() -> Iterator[Callable[[str], Report]]:
    columns = (
        TextColumn("{task.description:<12}"), BarColumn(24), MofNCompleteColumn(), _Rate(), TimeRemainingColumn(),
        TextColumn("{task.fields[values]}"),
    )  # fmt: skip
    with Progress(*columns, console=err) as bars:

        def watch(stage: str) -> Report:
            task: TaskID | None = None

            def report(done: int, total: int, unit: str, **values: float) -> None:
                nonlocal task
                shown = " ".join(f"{name} {value:.3g}" for name, value in values.items())
                if task is None:
                    task = bars.add_task(stage, total=total, unit=unit, values=shown)
                bars.update(task, completed=done, total=total, unit=unit, values=shown)

            return report

        yield watch


def table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """A plain table; numbers are aligned to the right; text is shown as it is, markup and all."""
    rows = [list(row) for row in rows]
    made = Table(box=None, pad_edge=False, header_style="bold")
    for i, header in enumerate(headers):
        numeric = bool(rows) and all(isinstance(row[i], int | float) for row in rows)
        made.add_column(header, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        made.add_row(*(escape(f"{cell:.4g}" if isinstance(cell, float) else str(cell)) for cell in row))
    return made


def tokens(strings: Sequence[str], acts: Sequence[float], maximum: float) -> Text:
    """A window of text in which each token is shaded by the feature's activation on it."""
    text = Text()
    for string, act in zip(strings, acts, strict=True):
        level = min(4, int(4 * act / maximum + 0.999)) if maximum > 0 and act > 0 else 0
        text.append(string.replace("\n", "⏎"), style=_HEAT[level])
    return text
