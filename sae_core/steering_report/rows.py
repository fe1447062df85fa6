"""What the report says of a feature, and where it is kept."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

REPORT = "steering_report.parquet"


class Row(NamedTuple):
    """A feature under one condition, over one half of the prompts."""

    feature: int
    name: str
    """The words that stand for it."""
    output_score: float
    half: str
    """`choose` or `report`."""
    condition: str
    """`base`, `steered`, `random_direction`, `random_feature` or `prompt_only`."""
    strength: float | None
    chosen: bool
    """Whether this strength was chosen; always true of what is reported."""
    concept_rate: float
    """Share of the tokens that are the feature's words."""
    low: float
    high: float
    """95% bootstrap interval of that, over texts."""
    ratio: float
    """`concept_rate` over that of the model as it is on all prompts, or over half a token of them where it has none."""
    texts_with_concept: float
    perplexity_ratio: float
    """Perplexity under the model as it is, over that of its own texts on the same prompts (geometric means)."""
    repetition: float
    kl_first: float
    """KL divergence of the first token's distribution from the default one, nats, mean over prompts; NaN while a
    strength is chosen."""
    n_texts: int
    sample: str
    """The first of the texts."""


SCHEMA = pa.schema(
    [
        ("feature", pa.int32()), ("name", pa.string()), ("output_score", pa.float32()), ("half", pa.string()),
        ("condition", pa.string()), ("strength", pa.float32()), ("chosen", pa.bool_()), ("concept_rate", pa.float32()),
        ("low", pa.float32()), ("high", pa.float32()), ("ratio", pa.float32()), ("texts_with_concept", pa.float32()),
        ("perplexity_ratio", pa.float32()), ("repetition", pa.float32()), ("kl_first", pa.float32()),
        ("n_texts", pa.int32()), ("sample", pa.string()),
    ]
)  # fmt: skip


def read_report(folder: Path) -> list[Row]:
    """The rows of a finished report."""
    return [Row(**row) for row in pq.read_table(folder / REPORT).to_pylist()]


def raised(rows: Iterable[Row], perplexity_ratio_max: float) -> list[int]:
    """Features whose concept steering raises at least tenfold within the bound, on the reporting half."""
    return [
        row.feature
        for row in rows
        if (row.half, row.condition) == ("report", "steered")
        and row.ratio >= 10
        and row.perplexity_ratio <= perplexity_ratio_max
    ]
