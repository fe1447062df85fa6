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
LABELERS = "labelers"

Status = Literal["written", "failed", "lexical", "dead"]

_SCORE = pa.struct(
    [
        ("scorer", pa.string()), ("score", pa.float64()), ("low", pa.float64()), ("high", pa.float64()),
        ("shuffled", pa.float64()), ("lexical", pa.float64()), ("margin_low", pa.float64()),
        ("random", pa.float64()), ("nearest", pa.float64()), ("neighbor", pa.float64()),
        ("levels", pa.list_(pa.float64())), ("failed", pa.float64()), ("n_firing", pa.int32()),
        ("n_silent", pa.int32()), ("prompt_tokens", pa.int32()), ("completion_tokens", pa.int32()),
    ]
)  # fmt: skip
SCHEMA = pa.schema(
    [
        ("feature", pa.int32()), ("label", pa.string()), ("description", pa.string()), ("kind", pa.string()),
        ("confidence", pa.float64()), ("status", pa.string()), ("lexical", pa.string()), ("model", pa.string()),
        ("prompt_version", pa.string()), ("seed", pa.int64()), ("prompt_tokens", pa.int32()),
        ("completion_tokens", pa.int32()), ("dollars", pa.float64()), ("seconds", pa.float64()),
        ("made_at", pa.string()), ("examples", pa.list_(pa.int32())), ("error", pa.string()),
        ("scores", pa.list_(_SCORE)), ("shuffled_from", pa.int32()), ("beats_control", pa.bool_()),
    ]
)  # fmt: skip


BEST_SCORE = "coalesce({})".format(
    ", ".join(
        f"list_filter(scores, lambda s: s.scorer = '{s}')[1].score" for s in ("detection", "fuzzing", "embedding")
    )
)
"""SQL of how far to believe a label: the score of the scorer that goes the furthest; NULL where there is none."""


NO_BETTER = "no better than another's label"
"""What is said of a label that does not beat its control, wherever it is shown."""


def doubted(label: str, beats_control: bool | None) -> str:
    """A label as text shows it: marked when another feature's label did as well in its place."""
    return f"{label} ({NO_BETTER})" if beats_control is False else label


class LabelError(MindAtlasError):
    """Labels that cannot be made or read."""


@dataclass(frozen=True, slots=True)
class Score:
    """How well a label tells texts in which its feature fires from others.

    0.5 is chance, 1 is all right; of specificity and of simulation, 0 is nothing.
    """

    scorer: str
    """`embedding`: AUC of the similarity of label and text. `detection`, `fuzzing`: balanced accuracy of a judge that
    is asked which texts the label fits, or in which texts the right tokens are marked; of one that is asked about each
    text by itself, the AUC of how likely it holds a yes. `specificity`: mean of the
    judge's ratings of the marked tokens, 0 (the label has nothing to do with the text) to 3 (it says cleanly what is
    marked). `simulation`: Pearson's correlation of the values that the judge expects on tokens with the true ones."""
    score: float | None
    """None where the judge answered nothing that can be read."""
    low: float | None
    """`low` to `high`: 95% interval, by bootstrap over the texts."""
    high: float | None
    shuffled: float | None
    """What another feature's label gets on the same texts; None where there was no other."""
    lexical: float | None
    """What the lexical label gets on them."""
    margin_low: float | None
    """Lower end of the 95% interval of `score - shuffled`, texts drawn in pairs: above 0, the label beats chance."""
    random: float | None
    """The score with the silent texts of one stratum alone: drawn at random."""
    nearest: float | None
    """Those most similar to the texts in which the feature fires."""
    neighbor: float | None
    """Those in which a feature with a similar decoder row fires."""
    levels: list[float | None]
    """The score with the firing texts of each activation level alone, the lowest first."""
    failed: float
    """Share of the texts on which the judge gave no answer that can be read."""
    n_firing: int
    n_silent: int
    prompt_tokens: int = 0
    """Of the judge, for the label and both controls."""
    completion_tokens: int = 0


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
    scores: tuple[Score, ...] = ()
    """None where the label was not scored: it was not written, or there were too few texts to score it on."""
    shuffled_from: int | None = None
    """The feature whose label was the control."""
    beats_control: bool | None = None
    """Whether the label does better than the control: whether `margin_low` is above 0 in the first of detection,
    fuzzing and embedding that was done. None where it was not scored."""

    @property
    def name(self) -> str:
        """What to call the feature: the written label, else the lexical one."""
        return self.label or self.lexical


class Labels:
    """The labels of all features of a dictionary."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def open(cls, folder: Path) -> "Labels":
        """The labels in `folder`. Raises LabelError when there are none."""
        found = cls(folder / LABELS)
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
    scores = tuple(Score(**score) for score in values.get("scores") or ())
    return LabelRow(**values | {"examples": tuple(values["examples"]), "scores": scores})
