"""Names for the map's clusters: the tokens that tell a cluster's features from the others'."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from jaxtyping import Integer
from scipy.sparse import coo_array

WORDS = 3
"""Tokens in a name."""
_NO_WORD = 0.3
"""What a token counts that does not begin with two letters."""


def cluster_names(features: pa.Table, cluster: Integer[np.ndarray, " d_sae"]) -> dict[int, str]:
    """A name for each cluster that has any token to be named by: tf-idf with the cluster as the document.

    A token counts in a cluster by the sum of its shares in the features' firings, times the logarithm of one more than
    how many clusters there are for each one that has it (c-TF-IDF, Grootendorst 2022). Tokens are compared without
    case and outer blanks; bytes that are no text are left out; ties go by the alphabet.

    Args:
        features: `top_tokens` and `top_token_shares`, lists, a row for each feature.
        cluster: of each feature; -1 is none.
    """
    tokens, shares = (features[name].combine_chunks() for name in ("top_tokens", "top_token_shares"))
    spelled = tokens.flatten().dictionary_encode()
    words = pc.utf8_trim(pc.utf8_lower(spelled.dictionary), " ").dictionary_encode()
    word = words.indices.to_numpy()[spelled.indices.to_numpy()]
    group = np.repeat(cluster, np.diff(tokens.offsets.to_numpy()))
    kept = (group >= 0) & _is_text(words.dictionary)[word]
    if not kept.any():
        return {}
    size = int(group.max()) + 1, len(words.dictionary)
    sums = coo_array((shares.flatten().to_numpy()[kept].astype(np.float64), (group[kept], word[kept])), size).tocsr()
    sums.sum_duplicates()
    n_clusters = np.count_nonzero(np.diff(sums.indptr))
    rarity = np.log1p(n_clusters / np.bincount(sums.indices, minlength=size[1]).clip(1))
    weight = rarity * np.where(pc.match_substring_regex(words.dictionary, r"^\p{L}{2,}").to_numpy(False), 1, _NO_WORD)
    names = {}
    for number in np.flatnonzero(np.diff(sums.indptr)).tolist():
        own = slice(sums.indptr[number], sums.indptr[number + 1])
        names[number] = _name(words.dictionary, sums.indices[own], sums.data[own] * weight[sums.indices[own]])
    return names


def _is_text(words: pa.Array) -> np.ndarray:
    is_bytes = pc.match_substring(words, "\\x")
    return pc.invert(pc.or_(pc.equal(words, ""), is_bytes)).to_numpy(zero_copy_only=False)


def _name(words: pa.Array, which: np.ndarray, score: np.ndarray) -> str:
    few = np.flatnonzero(score >= np.partition(score, -min(WORDS, len(score)))[-min(WORDS, len(score))])
    ranked = sorted((-score[i], words[int(which[i])].as_py()) for i in few)
    return " · ".join(word for _, word in ranked[:WORDS]).replace("\n", "⏎")
