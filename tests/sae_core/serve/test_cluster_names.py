"""Names of clusters, against a naive count word by word."""

import math
import re
from collections import defaultdict

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_core.serve.cluster_names import WORDS, cluster_names

TOKENS = st.sampled_from(
    [" the", "The", " bridge", "Bridge", "gate", "1", "é", "été", "", " ", "\\xf0", "\n", "ß", "  a"]
)
FEATURES = st.lists(
    st.tuples(st.integers(-1, 3), st.lists(st.tuples(TOKENS, st.floats(0.125, 1, width=32)), max_size=4)), min_size=1
)


def naive(features: list[tuple[int, list[tuple[str, float]]]]) -> dict[int, dict[str, float]]:
    """Each cluster's words with what they count."""
    sums: dict[int, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for cluster, tokens in features:
        for token, share in tokens:
            word = token.lower().strip(" ")
            if cluster >= 0 and word and "\\x" not in word:
                sums[cluster][word] += share
    spread = {word: sum(word in own for own in sums.values()) for own in sums.values() for word in own}
    plain = {word: 1 if re.match(r"[^\W\d_]{2}", word) else 0.3 for word in spread}
    return {
        cluster: {w: total * plain[w] * math.log(1 + len(sums) / spread[w]) for w, total in own.items()}
        for cluster, own in sums.items()
    }


def as_table(features: list[tuple[int, list[tuple[str, float]]]]) -> pa.Table:
    tokens = [[token for token, _ in own] for _, own in features]
    shares = [[share for _, share in own] for _, own in features]
    return pa.table({
        "top_tokens": pa.array(tokens, pa.list_(pa.string())),
        "top_token_shares": pa.array(shares, pa.list_(pa.float32())),
    })  # fmt: skip


@settings(deadline=None)  # the first call imports
@given(FEATURES)
def test_a_name_is_of_the_words_that_count_most(features: list[tuple[int, list[tuple[str, float]]]]) -> None:
    names = cluster_names(as_table(features), np.array([cluster for cluster, _ in features]))
    expected = naive(features)
    assert names.keys() == expected.keys()
    for cluster, scores in expected.items():
        chosen = [word.replace("⏎", "\n") for word in names[cluster].split(" · ")]
        assert len(chosen) == min(WORDS, len(scores))
        best = sorted(scores.values(), reverse=True)[:WORDS]
        assert [scores[word] for word in chosen] == pytest.approx(best)


def test_ties_go_by_the_alphabet_and_a_line_break_is_shown() -> None:
    features = [(0, [("b", 0.5), ("a", 0.5), ("\n", 0.5), ("c", 0.5)])]
    assert cluster_names(as_table(features), np.array([0])) == {0: "⏎ · a · b"}


def test_without_clusters_there_are_no_names() -> None:
    assert cluster_names(as_table([(-1, [("a", 1.0)]), (0, [])]), np.array([-1, 0])) == {}
