"""What the report says of a feature, and where it is kept."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

REPORT = "steering_report.parquet"


class Row(NamedTuple):
    """A feature under one condition."""

    feature: int
    label: str
    """What it is called."""
    words: str
    """Those that stand for it."""
    output_score: float
    condition: str
    """`base`, `steered`, `random_direction`, `random_feature` or `prompt_only`."""
    strength: float | None
    concept_rate: float
    """Share of the tokens that are the feature's words."""
    low: float
    high: float
    """95% bootstrap interval of that, over texts, as of all that have one."""
    ratio: float
    """`concept_rate` over that of the model as it is, or over half a token of its texts where it has none."""
    texts_with_concept: float
    expected_rate: float
    """Mean over the tokens of the probability that they would be the feature's words, as they were drawn: what
    `concept_rate` comes near to over many texts, with less of the luck of drawing."""
    expected_low: float
    expected_high: float
    expected_ratio: float
    """`expected_rate` over that of the model as it is, or over half a token of its texts where it has less."""
    similarity: float
    """Cosine of the texts and the label, by a sentence-embedding model (see `labels.scoring.embedding`)."""
    similarity_low: float
    similarity_high: float
    perplexity_ratio: float
    """Perplexity under the model as it is, over that of its own texts on the same prompts (geometric means)."""
    repetition: float
    kl_first: float
    """KL divergence of the first token's distribution from the default one, nats, mean over prompts."""
    n_texts: int
    sample: str
    """The first of the texts."""
    n_graded: int = 0
    """Texts that a language model graded; the grades are means over these, None where there is none."""
    concept: float | None = None
    instruction: float | None = None
    fluency: float | None = None
    """0 to 2, as the other two."""
    overall: float | None = None
    """Mean of the harmonic means of the three."""
    overall_low: float | None = None
    overall_high: float | None = None


SCHEMA = pa.schema(
    [
        ("feature", pa.int32()), ("label", pa.string()), ("words", pa.string()), ("output_score", pa.float32()),
        ("condition", pa.string()), ("strength", pa.float32()), ("concept_rate", pa.float32()), ("low", pa.float32()),
        ("high", pa.float32()), ("ratio", pa.float32()), ("texts_with_concept", pa.float32()),
        ("expected_rate", pa.float32()), ("expected_low", pa.float32()), ("expected_high", pa.float32()),
        ("expected_ratio", pa.float32()),
        ("similarity", pa.float32()), ("similarity_low", pa.float32()), ("similarity_high", pa.float32()),
        ("perplexity_ratio", pa.float32()), ("repetition", pa.float32()), ("kl_first", pa.float32()),
        ("n_texts", pa.int32()), ("sample", pa.string()), ("n_graded", pa.int32()), ("concept", pa.float32()),
        ("instruction", pa.float32()), ("fluency", pa.float32()), ("overall", pa.float32()),
        ("overall_low", pa.float32()), ("overall_high", pa.float32()),
    ]
)  # fmt: skip


def read_report(folder: Path) -> list[Row]:
    """The rows of a finished report."""
    return [Row(**row) for row in pq.read_table(folder / REPORT).to_pylist()]


def raised(rows: Sequence[Row], perplexity_ratio_max: float) -> list[int]:
    """Features whose words steering makes at least ten times as frequent, within the bound.

    Their interval must lie above what the model says as it is: a word said once by chance is none.
    """
    base = {row.feature: row.concept_rate for row in rows if row.condition == "base"}
    return [
        row.feature
        for row in rows
        if row.condition == "steered"
        and row.ratio >= 10
        and row.low > base[row.feature]
        and row.perplexity_ratio <= perplexity_ratio_max
    ]


def expected_to_rise(rows: Sequence[Row], perplexity_ratio_max: float) -> list[int]:
    """The same by what is expected in place of what was said."""
    expected = [
        row._replace(concept_rate=row.expected_rate, low=row.expected_low, ratio=row.expected_ratio) for row in rows
    ]
    return raised(expected, perplexity_ratio_max)
