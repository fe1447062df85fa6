"""Features by words and by meaning, in one order."""

import numpy as np
from jaxtyping import Float32, Int64

from sae_core.atlas.choosing import Found, least

_RANK = 60  # of reciprocal rank fusion (Cormack, Clarke and Büttcher 2009): how little the first few ranks differ
_RANKED = 1000  # features found by words whose rank is looked up; those after them follow by their relevance


def fused(words: Found, cosines: Float32[np.ndarray, " n"], near: Int64[np.ndarray, " n"]) -> Found:
    """What words found and what is `near` in meaning, nearest first, ordered by the sum of 1/(60 + rank)."""
    if not len(near):
        return words
    total, by_words = np.zeros_like(words.total), words.features
    if len(by_words):
        best = by_words[least(-words.total[by_words], _RANKED)]
        total[by_words] = words.total[by_words] / words.total[best[-1]] / (_RANK + len(best))
        total[best] = 1 / (_RANK + np.arange(1, len(best) + 1))
    total[near] += 1 / (_RANK + np.arange(1, len(near) + 1))
    meaning = dict(zip(near.tolist(), cosines.tolist(), strict=True))

    def why(feature: int) -> str:
        at = np.searchsorted(by_words, feature)
        is_in = at < len(by_words) and by_words[at] == feature
        return words.why(feature) if is_in else f"meaning: cosine {meaning[feature]:.2f} with its name"

    return Found(np.flatnonzero(total), total, why, meaning)
