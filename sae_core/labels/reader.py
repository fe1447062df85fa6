"""`Labels`: the reader of a finished labels artifact. Light: pyarrow, no client."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from sae_core.errors import MindAtlasError

LABELS = "labels.parquet"
ATTEMPTS = "attempts.jsonl"

Status = Literal["written", "failed", "lexical", "dead"]

SCHEMA = pa.schema(
    [
        ("feature", pa.int32()), ("label", pa.string()), ("description", pa.string()), ("kind", pa.string()),
        ("confidence", pa.float64()), ("status", pa.string()), ("lexical", pa.string()), ("model", pa.string()),
        ("prompt_version", pa.string()), ("seed", pa.int64()), ("prompt_tokens", pa.int32()),
        ("completion_tokens", pa.int32()), ("dollars", pa.float64()), ("seconds", pa.float64()),
        ("made_at", pa.string()), ("examples", pa.list_(pa.int32())), ("error", pa.string()),
    ]
)  # fmt: skip


class LabelError(MindAtlasError):
    """Labels that cannot be made or read."""


@dataclass(frozen=True, slots=True)
class LabelRow:
    """What a feature is called, and where the name comes from."""

    feature: int
    lexical: str = ""
    """The name made without a language model; empty for a dead feature."""
    status: Status = "lexical"
    """`written` by a model; asked for but `failed`; only `lexical`, not asked for; `dead`: it never fires."""
    label: str = ""
    """The written name; empty unless the status is `written`."""
    description: str = ""
    kind: str = ""
    """What explains the feature: `input` (the text it fires on), `output` (what it promotes), `both`, `unclear`."""
    confidence: float | None = None
    """The label writer's own, 0 to 1; None where it gave none."""
    model: str = ""
    prompt_version: str = ""
    seed: int = 0
    """Of the choice of the examples, and of the sampling."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    dollars: float | None = 0.0
    """What the answers cost; None where the price is not known."""
    seconds: float = 0.0
    """Time until the answers were there, when they were bought."""
    made_at: str = ""
    """When the last answer was there: ISO 8601, UTC."""
    examples: tuple[int, ...] = ()
    """The examples shown to the label writer: indices into `Features.examples(feature)`."""
    error: str = ""
    """Why it failed."""

    @property
    def name(self) -> str:
        """What to call the feature: the written label, else the lexical one."""
        return self.label or self.lexical


class Labels:
    """The labels of all features of a dictionary."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / LABELS

    @classmethod
    def open(cls, folder: Path) -> "Labels":
        """The labels in `folder`. Raises LabelError when there are none."""
        found = cls(folder)
        if not found.path.is_file():
            raise LabelError(f"{found.path} is missing: make the labels again with `mind-atlas run`")
        return found

    @cached_property
    def _table(self) -> pa.Table:
        return pq.read_table(self.path)

    def table(self) -> pa.Table:
        """One row for each feature, in order; columns as in `LabelRow`."""
        return self._table

    def label(self, feature: int) -> LabelRow:
        """The row of a feature. Raises LabelError when there is no such feature."""
        n = self._table.num_rows
        if not 0 <= feature < n:
            raise LabelError(f"there is no feature {feature}: this dictionary has features 0 to {n - 1}")
        return _row(self._table.slice(feature, 1).to_pylist()[0])

    def rows(self) -> list[LabelRow]:
        """The rows of all features, in order."""
        return [_row(values) for values in self._table.to_pylist()]


def _row(values: dict[str, Any]) -> LabelRow:
    return LabelRow(**values | {"examples": tuple(values["examples"])})
