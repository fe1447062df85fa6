"""How well a feature tells one kind of text from the rest: a language, a script, code.

A feature is a detector: it says yes where its value is above a threshold. Of the thresholds its own values offer,
the one with the best F1 is taken, so the numbers are those of the best cut; judge a feature on the held-out split,
which the dictionary has not seen.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float, Int

from sae_core.activations import Activations
from sae_core.corpus import Blocks
from sae_core.dictionary import Dictionary
from sae_core.features.runs import begins, is_first, rank

_BATCH = 4096  # activations encoded at once


@dataclass(frozen=True, slots=True)
class Detector:
    """A feature as a yes-or-no test."""

    feature: int
    precision: float
    """Share of its yeses that are right."""
    recall: float
    """Share of what it should find that it finds."""
    f1: float
    threshold: float
    """It says yes at this value and above."""


def best_detectors(
    dictionary: Dictionary, activations: Activations, blocks: Blocks, is_positive: Callable[[int], bool],
    unit: Literal["token", "document"] = "token", limit: int = 10,
) -> list[Detector]:  # fmt: skip
    """The features that best tell the positive documents from the others, best F1 first.

    Args:
        dictionary: whose features are tried, all of them.
        activations: one split, small enough that its firings fit into memory (about 100 bytes each, `l0` a token).
        blocks: the same split of the corpus.
        is_positive: whether a document, by number, is of the kind that is looked for.
        unit: judge each `token`, or each `document` by the feature's largest value in it.
        limit: how many features are returned.

    Returns:
        At most `limit` detectors; none when no document is positive.
    """
    documents = np.asarray(blocks.documents)
    present = np.unique(documents[documents >= 0])
    positive = np.zeros(int(present.max(initial=-1)) + 1, bool)
    positive[present] = [is_positive(int(document)) for document in present]
    parts = list(_firings(dictionary, activations, documents))
    feature, document, value = (np.concatenate(part) for part in zip(*(p[:3] for p in parts), strict=True))
    seen = np.concatenate([p[3] for p in parts])  # the document of every token
    if unit == "document":
        feature, document, value = _strongest(feature, document, value)
        seen = np.unique(seen)
    return _rank(feature, value, positive[document], int(positive[seen].sum()), limit)


def _firings(
    dictionary: Dictionary, activations: Activations, documents: Int[np.ndarray, "blocks length"]
) -> Iterator[tuple[np.ndarray, ...]]:
    """Feature, document and value of the firings of a batch of tokens, and the document of each token; no sinks."""
    for shard in activations.shards():
        kept = np.flatnonzero(~np.asarray(shard.is_sink, dtype=bool))
        of_token = documents[np.asarray(shard.block), np.asarray(shard.offset)]
        for start in range(0, len(kept), _BATCH):
            rows = kept[start : start + _BATCH]
            acts = dictionary.encode_sparse(shard.acts[torch.from_numpy(rows)].to(dictionary.W_dec.device))
            seen = of_token[rows]
            yield acts.feature.cpu().numpy(), seen[acts.row.cpu().numpy()], acts.value.cpu().numpy(), seen


def _strongest(feature: np.ndarray, document: np.ndarray, value: np.ndarray) -> tuple[np.ndarray, ...]:
    """For each feature and document in which it fires, its largest value."""
    by = np.lexsort((-value, document, feature))
    by = by[is_first(feature[by], document[by])]
    return feature[by], document[by], value[by]


def _rank(
    feature: Int[np.ndarray, " n"], value: Float[np.ndarray, " n"], is_right: Bool[np.ndarray, " n"], wanted: int,
    limit: int,
) -> list[Detector]:  # fmt: skip
    """Best cut of each feature, from its yeses in falling order of value; `wanted` is how many it should find."""
    if not len(feature) or not wanted:
        return []
    by = np.lexsort((-value, feature))
    feature, value, is_right = feature[by], value[by], is_right[by]
    hits = np.cumsum(is_right)
    hits -= (hits - is_right)[begins(feature)]  # counted within the feature
    yeses = rank(feature) + 1
    is_cut = np.append(is_first(feature, value)[1:], True)  # equal values are on the same side of any threshold
    f1 = np.where(is_cut, 2 * hits / (yeses + wanted), -1.0)
    best = np.lexsort((feature, -f1))
    _, first = np.unique(feature[best], return_index=True)
    chosen = best[np.sort(first)[:limit]]
    return [
        Detector(int(feature[i]), float(hits[i] / yeses[i]), float(hits[i] / wanted), float(f1[i]), float(value[i]))
        for i in chosen
    ]
