from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_core.features import FeatureRow
from sae_core.labels.lexical import WIDTH, lexical_label

FEATURE = FeatureRow(
    0, 100, 0.01, 5.0, 2.0, False, [" orbit", "Orbit", " moon"], [3.0, 2.0, 1.0], [], [], [],
    [" planet", "Planet", " Mars"], [0.3, 0.2, 0.4],
)  # fmt: skip


def test_variants_in_case_and_spaces_count_as_one_token():
    assert lexical_label(FEATURE) == 'fires on "planet", "Mars" · promotes "orbit", "moon"'


def test_tokens_that_hardly_ever_occur_are_not_named():
    rare = replace(FEATURE, top_tokens=["a", "b", "c"], top_token_shares=[0.95, 0.03, 0.01])
    assert lexical_label(rare).startswith('fires on "a" ·')


def test_a_dead_feature_has_none():
    assert lexical_label(replace(FEATURE, is_dead=True)) == ""


@pytest.mark.parametrize("token", ["\n", "  ", '"', "\t\t"])
def test_a_token_that_cannot_be_seen_is_quoted(token):
    label = lexical_label(replace(FEATURE, top_tokens=[token], top_token_shares=[1.0]))
    assert "\n" not in label
    assert "\t" not in label
    assert label.startswith('fires on "')


def test_a_feature_without_promoted_tokens_is_named_by_what_it_fires_on():
    assert lexical_label(replace(FEATURE, promoted=[])) == 'fires on "planet", "Mars"'


@settings(max_examples=40, deadline=None)
@given(st.lists(st.text(max_size=40), max_size=8), st.lists(st.text(max_size=40), max_size=8))
def test_a_label_is_one_short_line(fires, promoted):
    feature = replace(FEATURE, top_tokens=fires, top_token_shares=[0.1] * len(fires), promoted=promoted)
    label = lexical_label(feature)
    assert len(label.splitlines()) <= 1
    assert len(label) <= WIDTH + 30
