"""Plans: what a budget buys at a known speed under a known law, and how the speed is found."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from torch import Tensor

from sae_core.activations import Activations
from sae_core.artifacts import ArtifactStore
from sae_core.dictionary.trainer import StepMetrics, Training
from sae_core.names import Site
from sae_core.science import planning
from sae_core.science.planning import Budget, Gaussian, Line, PlanError, Speed, flops, law_for, measure_speed, propose
from sae_core.science.scaling import Scaling
from sae_core.study import ScalingSettings
from tests.sae_core.science.conftest import BASE
from tests.sae_core.science.test_scaling import LAW, made_up

SPEED = Speed(Line(1e-5, 1e-8), Line(1e-6, 1e-9), splice=20.0)
D_MODEL, MEASURED = 32, 100_000


@pytest.fixture(scope="module")
def known() -> Scaling:
    return made_up(ScalingSettings(resamples=20))


def loss(d_sae: int, tokens: int) -> float:
    return float(LAW.at(np.array([[d_sae], [tokens // BASE.batch_tokens]], float))[0])


def test_what_a_time_buys_fits_into_it_and_nothing_else_that_does_is_better(known: Scaling):
    found = propose(Budget(seconds=600.0), known, SPEED, BASE, D_MODEL, MEASURED)
    assert 590 < found.seconds <= 600
    for d_sae in planning.GRID:
        tokens = int((600 - SPEED.seconds(d_sae, 0, MEASURED)) / SPEED.step.at(d_sae))
        if tokens > 64 * BASE.batch_tokens:
            assert loss(found.d_sae, found.tokens) <= loss(d_sae, tokens) + 1e-4
    assert found.fvu.low - 1e-9 <= found.fvu.value <= found.fvu.high + 1e-9
    assert found.fvu.value == pytest.approx(loss(found.d_sae, found.tokens), rel=0.01)


def test_flops_are_spent_at_the_optimum_of_the_law(known: Scaling):
    found = propose(Budget(flops=1e14), known, SPEED, BASE, D_MODEL, MEASURED)
    assert flops(D_MODEL, found.d_sae, found.tokens) == pytest.approx(1e14, rel=0.01)
    best = LAW.optimal_d_sae(1e14 / flops(D_MODEL, 1, BASE.batch_tokens))
    assert best / 1.5 < found.d_sae < best * 1.5


def test_tokens_get_the_size_they_are_best_for(known: Scaling):
    found = propose(Budget(tokens=640_000), known, SPEED, BASE, D_MODEL, MEASURED)
    assert found.tokens == 640_000
    steps = found.tokens // BASE.batch_tokens
    best = LAW.matching_d_sae(steps)
    assert best / 1.5 < found.d_sae < best * 1.5
    assert LAW.optimal_d_sae(best * steps) == pytest.approx(best)


def test_a_budget_for_nothing_is_refused_with_what_the_least_would_be(known: Scaling):
    with pytest.raises(PlanError, match=r"does not reach 30 steps of 128 features, which is .* tokens here: give more"):
        propose(Budget(seconds=1.0), known, SPEED, BASE, D_MODEL, MEASURED)


def test_the_measured_speed_is_that_of_steps_whatever_the_first_and_a_busy_moment_took(
    source: Activations, monkeypatch: pytest.MonkeyPatch
):
    clock, learn = [0.0], Training.learn

    def tick() -> float:
        clock[0] += 1e-9
        return clock[0]

    def timed(self: Training, batch: Tensor) -> StepMetrics:
        odd = self.done in (0, planning.WARM_STEPS + 1)
        clock[0] += 60.0 if odd else 0.01 + 1e-5 * self.settings.d_sae
        return learn(self, batch)

    monkeypatch.setattr(planning, "time", SimpleNamespace(perf_counter=tick))
    monkeypatch.setattr(Training, "learn", timed)
    monkeypatch.setattr(planning, "TIMED_SIZES", (64, 256))
    speed = measure_speed(BASE, source)
    assert speed.step.at(1024) * BASE.batch_tokens == pytest.approx(0.01 + 1e-5 * 1024)
    assert clock[0] > 4 * 60


def test_speed_is_measured_without_activations_too(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(planning, "TIMED_SIZES", (64, 256))
    speed = measure_speed(BASE, Gaussian(32))
    assert speed.step.at(128) > 0
    assert speed.measuring.at(128) > 0


def test_a_line_goes_through_what_was_timed_and_never_below_zero():
    assert Line.through((1, 3), (2.0, 4.0)) == pytest.approx((1.0, 1.0))
    assert Line.through((1, 2), (1.0, 3.0)).base == 0


def test_the_law_that_ships_stands_in_for_a_site_without_a_sweep_and_says_so(tmp_path: Path):
    site = Site("m", "resid_post", 3, "text")
    scaling, note = law_for(ArtifactStore(tmp_path), site, 32)
    assert len(scaling.runs) >= 20
    assert scaling.joint.r2 > 0.95
    assert "the law is that of layer 15 of SmolLM2-135M-Instruct" in note
    assert "k = 32, the study of k = 16" in law_for(ArtifactStore(tmp_path), site, 16)[1]
