"""`Features`: the reader of a finished features artifact. Light: pyarrow, no torch."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from sae_core.by_feature import ByFeature
from sae_core.errors import MindAtlasError
from sae_core.settings import DOCUMENTED

FEATURES = "features.parquet"
EXAMPLES = "examples.parquet"
WINDOWS = "windows.parquet"
FIRINGS = "firings.parquet"


class FeatureError(MindAtlasError):
    """A feature that does not exist, or features that cannot be made or read."""


@dataclass(frozen=True, slots=True)
class FeatureRow:
    """What is known of one feature from the corpus and the weights alone."""

    __pydantic_config__ = DOCUMENTED

    feature: int
    n_fired: int
    """Tokens of the training split on which its value is above 0; attention sinks are not counted."""
    density: float
    """`n_fired` as a share of the tokens."""
    max_act: float
    mean_act: float
    """Mean over the tokens on which it fires; 0 for a dead feature."""
    is_dead: bool
    promoted: list[str]
    """Tokens whose logit its direction raises most, strongest first."""
    promoted_logits: list[float]
    suppressed: list[str]
    suppressed_logits: list[float]
    histogram: list[int]
    """Firings in equal bins of (0, max_act]."""
    top_tokens: list[str]
    """Tokens it fires on most often."""
    top_token_shares: list[float]
    """Share of its firings that each of these has."""

    def share(self, low: float, high: float) -> float:
        """Share of its firings in a range of the maximum (0 to 1): a bin counts by how much of it lies inside."""
        n = len(self.histogram)
        inside = (max(0.0, min(high * n, i + 1) - max(low * n, i)) * count for i, count in enumerate(self.histogram))
        return sum(inside) / max(self.n_fired, 1)


@dataclass(frozen=True, slots=True)
class Example:
    """A stretch of text in which the feature fires."""

    feature: int
    level: int
    """Activation level of the peak: level i of n is ((i - 1) / n, i / n] of the feature's maximum."""
    kind: str
    """`top`: one of the strongest; `level`: drawn at random from its level; `silent`: see `Features.silent`."""
    act: float
    """The feature's value at the peak."""
    document: int
    position: int
    """The peak's place among the document's tokens."""
    peak: int
    """The peak's place in `tokens`."""
    tokens: list[str]
    acts: list[float]
    """The feature's value on each of `tokens`; 0 on attention sinks, which are left out."""


class Sample:
    """Windows of text from all over the corpus, and everything that fires in them."""

    def __init__(self, windows: pa.Table, firings: pa.Table) -> None:
        self.tokens: list[list[str]] = windows["tokens"].to_pylist()
        self.documents: list[int] = windows["document"].to_pylist()
        self._feature, self._window, self._place, self._value = (column.to_numpy() for column in firings.columns)

    def acts(self, feature: int) -> dict[int, list[float]]:
        """The windows in which the feature fires, with its value on each of their tokens."""
        its = slice(*np.searchsorted(self._feature, [feature, feature + 1]))
        found: dict[int, list[float]] = {}
        for window, place, value in zip(self._window[its], self._place[its], self._value[its], strict=True):
            found.setdefault(int(window), [0.0] * len(self.tokens[window]))[place] = float(value)
        return found


class Features:
    """Firing statistics, examples and logit effects of all features of a dictionary."""

    def __init__(self, folder: Path) -> None:
        self.features_path = folder / FEATURES
        self.examples_path = folder / EXAMPLES

    @classmethod
    def open(cls, folder: Path) -> "Features":
        """The features in `folder`. Raises FeatureError when there are none."""
        found = cls(folder)
        for path in (found.features_path, found.examples_path):
            if not path.is_file():
                raise FeatureError(f"{path} is missing: make the features again with `mind-atlas run`")
        return found

    def __len__(self) -> int:
        """Number of features, dead ones too."""
        return len(self._rows)

    @cached_property
    def _rows(self) -> ByFeature:
        return ByFeature(self.features_path)

    @cached_property
    def _examples(self) -> ByFeature:
        return ByFeature(self.examples_path)

    @cached_property
    def _table(self) -> pa.Table:
        return pq.read_table(self.features_path)

    def table(self) -> pa.Table:
        """One row for each feature, in order; columns as in `FeatureRow`."""
        return self._table

    def columns(self, *names: str) -> pa.Table:
        """Some of the columns alone: the whole table of a million features takes more than a gigabyte of memory."""
        return pq.read_table(self.features_path, columns=list(names))

    def feature(self, feature: int) -> FeatureRow:
        """What is known of a feature. Raises FeatureError when there is no such feature."""
        if not 0 <= feature < len(self):
            raise FeatureError(f"there is no feature {feature}: this dictionary has features 0 to {len(self) - 1}")
        return FeatureRow(**self._rows.rows(feature)[0])

    def examples(self, feature: int) -> list[Example]:
        """The feature's examples, strongest first; none for a dead feature."""
        return [Example(**row) for row in self._examples.rows(feature)]

    def silent(self, feature: int, tokens: Sequence[str], limit: int) -> list[Example]:
        """Windows of the sample that hold one of the tokens and in which the feature does not fire at all, in order.

        Each has its peak at the first such token, at level 0. None where no sample is kept.
        """
        places = self._windows[1] if self._windows else {}
        holding = {window for token in tokens for window in places.get(token, [])}
        silent = sorted(holding - self.fires_in(feature))[:limit] if holding else []
        firsts = (next(i for i, token in enumerate(self.window(window)) if token in tokens) for window in silent)
        return [self.silent_in(feature, window, peak) for window, peak in zip(silent, firsts, strict=True)]

    def silent_in(self, feature: int, window: int, peak: int) -> Example:
        """A window of the sample in which the feature does not fire, with its peak at a place of our choice."""
        assert self._windows
        text = self.window(window)
        return Example(feature, 0, "silent", 0.0, self._windows[2][window], 0, peak, text, [0.0] * len(text))

    def fires_in(self, feature: int) -> set[int]:
        """The windows of the sample in which the feature fires; none where no sample is kept."""
        return set(self._firings.table(feature)["window"].to_pylist()) if self._firings else set()

    @property
    def n_windows(self) -> int:
        """Windows in the sample; 0 where none is kept."""
        return len(self._windows[0]) if self._windows else 0

    def window(self, window: int) -> list[str]:
        """The tokens of a window of the sample."""
        assert self._windows
        return self._windows[0][window].as_py()

    @cached_property
    def _firings(self) -> ByFeature | None:
        path = self.features_path.with_name(FIRINGS)
        return ByFeature(path) if path.is_file() else None

    @cached_property
    def _windows(self) -> tuple[pa.Array, dict[str, list[int]], list[int]] | None:
        """The sample's texts, the windows that hold each token, and their documents."""
        path = self.features_path.with_name(WINDOWS)
        if not path.is_file():
            return None
        table = pq.read_table(path).combine_chunks()
        places: dict[str, list[int]] = {}
        for window, text in enumerate(table["tokens"].to_pylist()):
            for token in set(text):
                places.setdefault(token, []).append(window)
        return table["tokens"].combine_chunks(), places, table["document"].to_pylist()

    def sample(self) -> Sample:
        """The sample of the corpus. Raises FeatureError when there is none."""
        try:
            return Sample(*(pq.read_table(self.features_path.with_name(name)) for name in (WINDOWS, FIRINGS)))
        except FileNotFoundError as error:
            raise FeatureError(f"{error.filename or WINDOWS} is missing: make the features again") from None
