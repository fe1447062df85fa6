import json
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_core.features import Example, Features
from sae_core.labels.prompts import (
    AFTER,
    BEFORE,
    BadAnswer,
    ask,
    ask_again,
    choose_examples,
    decile,
    mark,
    read_answer,
)


def example(tokens: list[str], acts: list[float], peak: int, kind: str = "top", level: int = 1) -> Example:
    return Example(0, level, kind, max(acts, default=0.0), 0, 0, peak, tokens, acts)


@pytest.fixture
def features(make_features) -> Features:
    return Features.open(make_features())


def test_the_firing_tokens_are_marked_as_one_run():
    marked = mark(example(["in", " New", " York", " now"], [0.0, 2.0, 1.0, 0.1], peak=1))
    assert marked == "in<< New York>> now"


def test_no_more_than_the_window_is_shown():
    tokens = [f" {i}" for i in range(40)]
    shown = mark(example(tokens, [0.0] * 20 + [1.0] + [0.0] * 19, peak=20)).replace("<<", "").replace(">>", "")
    assert shown.split() == [str(i) for i in range(20 - BEFORE, 20 + AFTER)]


@given(st.lists(st.text(), min_size=1, max_size=6))
def test_corpus_text_stays_on_its_line_and_closes_no_tag(tokens):
    shown = mark(example(tokens, [1.0] + [0.0] * (len(tokens) - 1), peak=0))
    assert len(shown.splitlines()) <= 1
    assert "</" not in shown


def test_marks_in_the_corpus_are_not_taken_for_ours():
    assert mark(example(["a << b", ">>"], [0.0, 1.0], peak=1)) == "a < < b<<> >>>"


def test_half_of_the_examples_are_the_top_ones_and_the_rest_lie_evenly_over_the_deciles(features):
    row, examples = features.feature(0), features.examples(0)
    chosen = [examples[i] for i in choose_examples(row, examples, 8, seed=0)]
    assert [e.act for e in chosen if e.kind == "top"][:4] == [10.0, 9.0, 8.0, 7.0]
    rest = [8.0, 6.0, 4.0, 2.0]  # the nearest there are to the deciles 1, 3, 6 and 8
    assert sorted(e.act for e in chosen) == sorted([10.0, 9.0, 8.0, 7.0, *rest])


def test_deciles_are_of_rank_and_not_of_value(features):
    """Nine firings in ten lie in the lowest twentieth of the values: nearly all deciles are there."""
    row = replace(features.feature(0), n_fired=100, max_act=10.0, histogram=[90, *[0] * 18, 10])
    acts = [0.01, 0.06, 0.15, 0.3, 0.49, 5.0, 9.6, 10.0]
    assert [decile(row, act) for act in acts] == [0, 1, 2, 5, 8, 9, 9, 9]
    tokens = [[f" {i}", "x"] for i in range(len(acts))]
    examples = [example(t, [0.0, act], peak=1, kind="level") for t, act in zip(tokens, acts, strict=True)][::-1]
    examples = [replace(e, act=max(e.acts)) for e in examples]
    chosen = [examples[i].act for i in choose_examples(row, examples, 4, seed=0)]
    assert chosen == [0.49, 0.3, 0.15, 0.06]  # for the deciles 8, 6, 3 and 1


def test_where_a_decile_has_no_example_left_the_nearest_one_gives_another(features):
    row = features.feature(0)
    examples = [example([f" {i}", "x"], [0.0, 10.0 - i / 10], peak=1, kind="level") for i in range(5)]
    assert choose_examples(row, examples, 4, seed=0) != []
    assert choose_examples(row, examples, 99, seed=0) == [0, 1, 2, 3, 4]
    assert choose_examples(row, [], 8, seed=0) == []


def test_an_example_that_reads_the_same_is_shown_once(features):
    row, first = features.feature(0), features.examples(0)[0]
    assert len(choose_examples(row, [first, replace(first, document=7), first], 8, seed=0)) == 1


def test_the_choice_depends_on_the_seed_only(features):
    row, level = features.feature(0), [e for e in features.examples(0) if e.kind == "level"]
    many = [replace(e, act=5.0, tokens=[*e.tokens[:-15], f" {i}", *e.tokens[-14:]]) for i, e in enumerate(level * 4)]
    choices = {seed: choose_examples(row, many, 4, seed) for seed in range(8)}
    assert choices == {seed: choose_examples(row, many, 4, seed) for seed in range(8)}
    assert len({tuple(c) for c in choices.values()}) > 1


def test_what_all_prompts_share_stands_first(features):
    first, second = (ask(features.feature(i), features.examples(i)[:8]) for i in (0, 1))
    assert first[:-1] == second[:-1]
    assert first[-1] != second[-1]


def test_the_question_holds_what_the_feature_fires_on_and_what_it_makes_likely(features):
    question = ask(features.feature(0), features.examples(0)[:1])[-1]["content"]
    assert 'fires on: " planet" 50%, "Planet" 20%, " Mars" 10%\n' in question
    assert 'makes likely: " orbit", " Orbit", "moon"\nmakes unlikely: " the"\n' in question


def test_texts_in_which_it_does_not_fire_follow_unmarked_where_they_are_asked_for(features):
    row, shown = features.feature(0), features.examples(0)[:1]
    silent = Example(0, 0, "silent", 0.0, 9, 0, 1, [" the", " planet", " hotel"], [0.0] * 3)
    question = ask(row, shown, [silent])[-1]["content"]
    assert question.startswith(ask(row, shown)[-1]["content"])
    assert question.endswith("\n<silent>\n the planet hotel\n</silent>")


def test_the_repair_turn_says_what_was_wrong_and_quotes_little_of_it(features):
    messages = ask_again(ask(features.feature(0), []), "x" * 50_000, "there is no label")
    assert len(messages[-2]["content"]) == 1000
    assert "there is no label" in messages[-1]["content"]


GOOD = '{"label": "planets", "description": "Names of planets.", "kind": "input", "confidence": 0.9}'


@pytest.mark.parametrize(
    "text",
    [
        GOOD,
        f"Sure! Here it is:\n```json\n{GOOD}\n```\nHope this helps {{smile}}.",
        f"<think>maybe {{x}}</think>{GOOD}",
        f'{{"thought": 1}} {GOOD}',
        f"[{GOOD}]",
    ],
)
def test_prose_around_the_object_does_no_harm(text):
    assert read_answer(text) == ("planets", "Names of planets.", "input", 0.9)


@pytest.mark.parametrize(
    "text",
    [
        "", "planets", "<html>no</html>", GOOD[:-10], '{"label": ""}', '{"label": 3}', '{"label": null}', "{" * 50_000,
        "word " * 10_000, json.dumps({"label": "word " * 10_000}), json.dumps({"label": "x" * 5000}),
        json.dumps({"label": "one two three four five six seven eight nine"}), "[1, 2]", '{"label": "\u202e"}',
        '{"a":' * 20_000,
    ],
)  # fmt: skip
def test_an_answer_without_a_usable_label_is_refused(text):
    with pytest.raises(BadAnswer):
        read_answer(text)


@pytest.mark.parametrize(
    ("fields", "kind", "confidence"),
    [({}, "unclear", None), ({"kind": "INPUT", "confidence": 80}, "unclear", None),
     ({"kind": "both", "confidence": "high"}, "both", None), ({"kind": ["input"], "confidence": True}, "unclear", None),
     ({"kind": "output", "confidence": 1}, "output", 1.0)],
)  # fmt: skip
def test_what_is_missing_beside_the_label_is_left_open(fields, kind, confidence):
    answer = read_answer(json.dumps({"label": "x"} | fields))
    assert (answer.kind, answer.confidence) == (kind, confidence)


def test_markup_stays_text_and_direction_marks_go():
    answer = read_answer(json.dumps({"label": "<b>\u202eevil\u2066</b>\n\x1b[31m name"}))
    assert answer.label == "<b>evil</b> [31m name"


@given(st.text())
def test_any_text_is_read_or_refused(text):
    try:
        answer = read_answer(text)
    except BadAnswer:
        return
    assert answer.label


@given(st.text())
def test_a_label_that_is_read_is_one_short_line(text):
    try:
        label = read_answer(json.dumps({"label": text})).label
    except BadAnswer:
        return
    assert 1 <= len(label.split()) <= 8
    assert len(label.splitlines()) == 1


def test_features_without_examples_can_be_asked_about(features):
    assert "<texts>\n\n</texts>" in ask(features.feature(0), [])[-1]["content"]
