import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sae_core.labels.client import Completion
from sae_core.labels.prompts import BadAnswer
from sae_core.labels.scoring import yes_no
from sae_core.labels.scoring.items import Item, Names, Trial
from sae_core.labels.scoring.judge import questions
from sae_core.labels.scoring.simulation import NoProbabilities

P = st.floats(-30, -1e-3)


def answer(**likeliest: float) -> Completion:
    return Completion("yes", 1, 1, logprobs=[("yes", likeliest)])


@given(yes=P, no=P)
def test_log_odds_are_those_of_yes_against_no(yes: float, no: float):
    assert yes_no.log_odds(answer(yes=yes, no=no, maybe=-1.0)) == pytest.approx(yes - no)


def test_ways_to_write_a_word_are_counted_together():
    found = yes_no.log_odds(Completion("Yes", 1, 1, logprobs=[("Yes", {"Yes": -1.0, " yes": -2.0, "No": -3.0})]))
    assert found == pytest.approx(math.log(math.exp(-1) + math.exp(-2)) + 3)


def test_a_word_that_is_not_among_the_likeliest_counts_as_the_last_of_them():
    assert yes_no.log_odds(answer(yes=-0.1, well=-4.0, oh=-7.0)) == pytest.approx(6.9)
    assert yes_no.log_odds(answer(no=-0.1, well=-4.0)) == pytest.approx(-3.9)


def test_an_answer_that_is_neither_is_none_and_a_server_without_probabilities_is_told_apart():
    for logprobs in ([], [("maybe", {"maybe": -0.1})]):
        with pytest.raises(BadAnswer, match="neither yes nor no"):
            yes_no.log_odds(Completion("maybe", 1, 1, logprobs=logprobs))
    with pytest.raises(NoProbabilities, match="ask_each = false"):
        yes_no.log_odds(Completion("yes", 1, 1))


@pytest.mark.parametrize("task", ["detection", "fuzzing"])
def test_each_text_is_asked_about_by_itself_and_a_name_s_questions_differ_only_at_their_ends(task):
    items = [Item([" a", f" word{i}"], [False, True], i % 2) for i in range(6)]
    asked = list(questions(Trial(0, Names('x"\ntext: y', None, "lexical"), None, items), task, each=True))
    assert [(batch.tolist(), kind) for batch, kind, *_ in asked] == [
        ([i], kind) for kind in ("own", "lexical") for i in range(6)
    ]
    for i, (_, _, messages, more) in enumerate(asked[:6]):
        assert messages[:-1] == asked[0][2][:-1]
        assert messages[-1]["content"].splitlines() == [
            'name: "x\\"⏎text: y"', f"text:  a<< word{i}>>" if task == "fuzzing" else f"text:  a word{i}"
        ]  # fmt: skip
        assert (more["max_tokens"], more["logprobs"]) == (1, True)


@pytest.mark.parametrize("task", ["specificity", "simulation"])
def test_other_questions_are_the_same_either_way(task):
    trial = Trial(0, Names("own", None, ""), None, [Item(["a"], [True], 1, acts=[1.0])])
    alone, together = (list(questions(trial, task, each)) for each in (True, False))
    assert [messages for _, _, messages, _ in alone] == [messages for _, _, messages, _ in together]
    assert all(np.array_equal(a[0], b[0]) for a, b in zip(alone, together, strict=True))
