"""Tasks as data: prompts that one token should follow and another should not; one TOML file each.

    name = "capitals"
    description = "The capital of a country, against another country's."
    prompts = [["The capital of France is the city of", " Paris", " Rome"]]

`paired = true` says that each prompt's contrast stands beside it. Only prompts that the model gets right are used.
"""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from pydantic import Field, model_validator

from sae_core.errors import MindAtlasError
from sae_core.settings import Settings
from sae_core.study import CircuitSettings
from sae_core.toml_files import read_toml

SHIPPED = Path(__file__).with_name("tasks")


class TaskError(MindAtlasError):
    """A task file that cannot be used; the message names the file, the key and the cure."""


class Prompt(NamedTuple):
    """A text and what should follow it."""

    text: str
    target: str
    """Its first token should follow."""
    against: str
    """Its first token should not."""


class Task(Settings):
    """Prompts that ask for one ability."""

    name: str = Field(pattern=r"^[a-z0-9_]+$")
    description: str
    license: str = ""
    """Of the prompts."""
    paired: bool = False
    """Whether prompts come in pairs, one after the other, that differ in what decides: each is the other's contrast."""
    prompts: list[Prompt] = Field(min_length=1)

    @model_validator(mode="after")
    def _pairs_are_opposites(self) -> "Task":
        for one, other in self.pairs:
            if (one.target, one.against) != (other.against, other.target):
                raise ValueError(
                    f"{one.text!r} and {other.text!r} are no pair: the tokens of one must be the other's, exchanged; "
                    "put each beside its own, or take out `paired`"
                )
        return self

    @property
    def pairs(self) -> list[tuple[Prompt, Prompt]]:
        """The pairs of a paired task."""
        if not self.paired:
            return []
        if len(self.prompts) % 2:
            raise ValueError(f"{len(self.prompts)} prompts are no pairs: give one more, or one less")
        return list(zip(self.prompts[::2], self.prompts[1::2], strict=True))


def load_tasks(folder: Path = SHIPPED, names: Iterable[str] = ()) -> list[Task]:
    """The tasks of a folder by name; only the `names`, where some are given.

    Raises:
        TaskError: the folder holds no task, a file is no task, or a name is unknown.
    """
    found = {task.name: task for task in map(load_task, sorted(folder.glob("*.toml")))}
    if not found:
        raise TaskError(f"{folder} holds no task: put .toml files into it, or name another folder")
    wanted = sorted(set(names) or found)
    if unknown := [name for name in wanted if name not in found]:
        raise TaskError(f"no task {unknown[0]!r}: known are {', '.join(sorted(found))}")
    return [found[name] for name in wanted]


def tasks_of(settings: CircuitSettings) -> list[Task]:
    """The tasks that a study names. Raises TaskError."""
    return load_tasks(Path(settings.folder) if settings.folder else SHIPPED, settings.tasks)


def load_task(path: Path) -> Task:
    """Read and check one file. Raises TaskError."""
    return read_toml(path, Task, TaskError)
