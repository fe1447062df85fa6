"""Features by the words of a query, wherever the index of words has them."""

import math

import numpy as np

from sae_core.atlas.choosing import Found, SearchError
from sae_core.word_index import FIELDS, WordIndex, terms

_SATURATION = 1.2  # k1 of BM25 (Robertson and Zaragoza 2009): the tenth example with a word adds less than the first
_SNIPPET = 40  # characters shown on each side of a match


def by_words(index: WordIndex, query: str, n_features: int) -> Found:
    """Features by words: in labels, in the tokens they promote or fire on, and in their examples' text.

    A word matches at the start of words, in any case; several words also match as a phrase. Each term counts by
    its rarity over the features (as in BM25) and by the fields it is found in; the sum is scaled by the share of
    the terms that were found.

    Raises:
        SearchError: the query holds no word.
    """
    words = terms(query)
    if not words:
        raise SearchError(f"{query!r} holds no word to search for: give one or more words")
    words, parts = [term for term in words if not index.is_common(term)], []
    total, n_terms = np.zeros(n_features), np.zeros(n_features, np.int8)
    for term in words:
        found, holds = index.find(term), np.zeros(n_features, bool)
        for part in found:
            holds[part.features] = True
        n_terms += holds
        idf = math.log(1 + (len(holds) - holds.sum() + 0.5) / (holds.sum() + 0.5))
        for part in found:
            scores = FIELDS[part.field][0] * idf * part.counts / (part.counts + _SATURATION)
            total[part.features] += scores
            parts.append((term, part, scores))

    def why(feature: int) -> str:
        places = ((*part, int(np.searchsorted(part[1].features, feature))) for part in parts)
        held = (x for x in places if x[3] < len(x[2]) and x[1].features[x[3]] == feature)
        term, part, _, place = max(held, key=lambda x: (x[2][x[3]], x[1].field, x[0]))
        return snippet(part.field, term, index.first_text(part, place))

    return Found(np.flatnonzero(n_terms), total * n_terms / max(len(words), 1), why)


def snippet(field: str, term: str, text: str) -> str:
    """The field, and the text around the term's first occurrence, on one line."""
    at = max(text.casefold().find(term), 0)
    start, stop = max(at - _SNIPPET, 0), at + len(term) + _SNIPPET
    shown = " ".join(text[start:stop].split())
    return f"{field}: {'...' if start else ''}{shown}{'...' if stop < len(text) else ''}"
