import numpy as np
import pytest

from sae_core.circuits.agreement import OnPrompt, agreement, measure_task
from sae_core.circuits.attribution import Trace
from sae_core.circuits.tasks import Prompt, Task
from sae_core.language_model import LanguageModel
from sae_core.prompt_reader import PromptReader

PROMPT = Prompt("a", " b", " c")


def on_prompt(ablation: list[float], **guesses: list[float]) -> OnPrompt:
    arrays = {name: np.array(guess, np.float32) for name, guess in guesses.items()}
    return OnPrompt(PROMPT, np.array(ablation, np.float32), arrays)


def test_a_guess_that_is_the_ablation_agrees_and_its_opposite_does_in_size_alone() -> None:
    truth = [float(i * (-1) ** i) for i in range(1, 31)]
    one = on_prompt(truth, right=truth, opposite=[-x for x in truth], small=[1 / x for x in truth])
    right, opposite = agreement([one, one], "right"), agreement([one, one], "opposite")
    assert (right.correlation, right.overlap, right.n_prompts) == (pytest.approx(1), 10, 2)
    assert right.correlation_error == pytest.approx(0, abs=1e-9)
    assert opposite.correlation == pytest.approx(-1)
    assert (opposite.of_size, opposite.overlap) == (pytest.approx(1), 10)
    assert agreement([one], "small").overlap == 0


def test_the_mean_over_prompts_and_its_error_are_those_of_the_correlations() -> None:
    rng = np.random.default_rng(0)
    prompts = [on_prompt(*(rng.normal(size=20).tolist() for _ in "a"), g=rng.normal(size=20).tolist()) for _ in "abcd"]
    each = [np.corrcoef(one.guesses["g"], one.ablation)[0, 1] for one in prompts]
    found = agreement(prompts, "g")
    assert found.correlation == pytest.approx(np.mean(each), abs=1e-6)
    assert found.correlation_error == pytest.approx(np.std(each, ddof=1) / 2, abs=1e-6)
    assert np.isnan(agreement([], "g").correlation)
    assert agreement([on_prompt([1.0, 2.0, 3.0], g=[5.0, 5.0, 5.0])], "g").correlation == 0


def test_only_prompts_that_the_model_gets_right_are_measured(lm: LanguageModel, reader: PromptReader) -> None:
    texts = ["The old bridge", "The lazy dog", "Rain fell on"]
    prompts = []
    for i, text in enumerate(texts):
        found = Trace(reader, text).attribute(" the", " dog")
        right = found.difference > 0
        wanted = (" the", " dog") if right == (i < 2) else (" dog", " the")  # the last one is asked for wrongly
        prompts.append(Prompt(text, *wanted))
    measured, share = measure_task(reader, Task(name="mini", description="x", prompts=prompts), steps=2)
    assert [one.prompt.text for one in measured] == texts[:2]
    assert share == pytest.approx(2 / 3)
    trace = Trace(reader, texts[0])
    found = trace.attribute(prompts[0].target, prompts[0].against)
    assert measured[0].guesses["attribution"] == pytest.approx(found.values.numpy(), abs=1e-4)
    assert measured[0].guesses["activation"] == pytest.approx(found.acts.value.numpy())
    places = found.top(5)
    assert measured[0].ablation[places.numpy()] == pytest.approx(trace.ablated(found, places).numpy(), abs=1e-4)
