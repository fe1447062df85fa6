"""A sample of the corpus in windows with every firing in them: text of which one knows what does not fire there.

Examples say where a feature fires. To tell how well a name fits one also needs text where it does not, and text where
a similar feature fires in its place.
"""

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Int64

from sae_core.corpus import Blocks
from sae_core.features.examples import draw
from sae_core.features.firings import Firings, windows
from sae_core.study import FeatureSettings

SCHEMA = pa.schema(
    [("feature", pa.int32()), ("window", pa.int32()), ("place", pa.int16()), ("value", pa.float32())]
)  # fmt: skip


class Sampled(NamedTuple):
    """Windows of text, at most one in a block, by block; no two hold the same text."""

    block: Int64[np.ndarray, " windows"]
    start: Int64[np.ndarray, " windows"]
    """First place in the block."""
    stop: Int64[np.ndarray, " windows"]
    """First place behind the window."""


def sample_windows(corpus: Blocks, settings: FeatureSettings) -> Sampled:
    """At most `settings.windows` windows, around tokens drawn at random from as many blocks (see `firings.windows`)."""
    every = np.arange(len(corpus.documents))
    block = np.sort(np.argsort(draw(settings.seed, every), kind="stable")[: settings.windows])
    filled = (np.asarray(corpus.documents[block]) >= 0).sum(1)
    offset = (draw(settings.seed, block, filled) * filled).astype(np.int64)
    found = windows(corpus, block, offset, settings.context_tokens)
    kept = np.sort(np.unique(found["window"], return_index=True)[1])
    return Sampled(block[kept], found["start"][kept].astype(np.int64), found["stop"][kept].astype(np.int64))


def firings_in(sampled: Sampled, features: range, shards: Iterable[Firings]) -> pa.Table:
    """The firings of a range of features inside the windows, by feature, window and place in the window."""
    parts = [np.empty((0, 4))]
    for firings in shards:
        window = np.minimum(np.searchsorted(sampled.block, firings.block), len(sampled.block) - 1)
        place = firings.offset - sampled.start[window]
        inside = (sampled.block[window] == firings.block) & (place >= 0) & (firings.offset < sampled.stop[window])
        columns = firings.feature + features.start, window, place, firings.value
        parts.append(np.stack([column[inside] for column in columns], axis=1))
    found = np.concatenate(parts)
    found = found[np.lexsort((found[:, 2], found[:, 1], found[:, 0]))]
    return pa.table({field.name: pa.array(found[:, i]).cast(field.type) for i, field in enumerate(SCHEMA)}, SCHEMA)
