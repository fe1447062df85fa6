import math

import numpy as np
import pytest

from sae_core.labels.client import Completion
from sae_core.labels.prompts import BadAnswer
from sae_core.labels.scoring.items import Item
from sae_core.labels.scoring.simulation import Correlation, NoProbabilities, correlation, simulated, values


def answer(*tokens: str, **candidates: dict[str, float]) -> Completion:
    """Every token certain, but for those of which other candidates are given: by place, as `at3`."""
    might = [candidates.get(f"at{i}", {token: 1}) for i, token in enumerate(tokens)]
    logprobs = [(t, {c: math.log(p) for c, p in of.items()}) for t, of in zip(tokens, might, strict=True)]
    return Completion("".join(tokens), 1, 1, logprobs=logprobs)


def test_a_token_s_value_is_the_mean_of_the_digits_that_might_stand_there():
    found = simulated(answer("1", ": ", "0", "\n", "2", ":", " 9", at2={"0": 0.5, "4": 0.25, "x": 0.25}))
    assert found[:2] == pytest.approx([4 / 3, 9])
    assert np.isnan(found[2:]).all()


def test_lines_that_are_none_are_passed_over_and_an_answer_without_any_is_refused():
    assert simulated(answer("Sure:\n", "2", ": ", "7", "\n", "99", ": ", "5", "\n3: 4 5"))[1] == 7
    with pytest.raises(BadAnswer, match="no line"):
        simulated(answer("I cannot say."))


def test_without_log_probabilities_there_is_no_value():
    with pytest.raises(NoProbabilities):
        simulated(Completion("1: 3", 1, 1))


def texts(n: int = 12) -> tuple[list[Item], np.ndarray]:
    """Texts of unlike length, in half of which the feature fires, and what might be said of them."""
    draw = np.random.default_rng(0)
    items = []
    for i in range(n):
        length = 8 + i
        acts = (draw.random(length) * (draw.random(length) < 0.3) * 10).tolist() if i % 2 else None
        items.append(Item(["x"] * length, [False] * length, level=i % 2, acts=acts))
    said = values(items) + draw.normal(0, 2, (n, 20))
    said[3, 4] = np.nan
    return items, said


def test_the_correlation_is_pearson_s_over_all_tokens_of_which_something_is_said():
    items, said = texts()
    true = values(items)
    known = np.isfinite(said)
    assert correlation(said, true)[0] == pytest.approx(np.corrcoef(said[known], true[known])[0, 1])
    weights = np.arange(len(items))
    again = np.repeat(said, weights, axis=0), np.repeat(true, weights, axis=0)
    assert correlation(said, true, weights[None])[0] == pytest.approx(correlation(*again)[0])


def test_what_says_the_same_of_all_tokens_explains_nothing():
    items, said = texts()
    assert correlation(np.full_like(said, 3.0), values(items))[0] == 0


def test_the_interval_holds_the_score_and_nothing_said_makes_none():
    items, said = texts()
    score = Correlation(items)
    low, high = score.interval(said)
    assert low < score.mean(said, np.full(len(items), True)) < high
    assert score.interval(said, said) == (0, 0)
    nothing = np.full_like(said, np.nan)
    assert score.mean(nothing, np.full(len(items), True)) is None
    assert all(math.isnan(end) for end in score.interval(nothing))
