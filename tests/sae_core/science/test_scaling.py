"""The sweep: which runs, that they are trained as if alone, and what is read from them."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from sae_core.activations import Activations
from sae_core.dictionary import Dictionary
from sae_core.dictionary.trainer import Training, default_lr
from sae_core.metrics import measure
from sae_core.science.laws import JointLaw
from sae_core.science.scaling import Run, Scaling, ScalingError, held_out, sweep, train_sweep
from sae_core.study import DictionarySettings, ScalingSettings
from sae_core.training import at_l0
from tests.sae_core.science.conftest import BASE, SWEEP

LAW = JointLaw(floor=0.1, a=0.3, alpha=1.0, b=5.0, beta=1.1, gamma=0.5)


def made_up(settings: ScalingSettings) -> Scaling:
    """Runs that follow a known law, with the best learning rate at twice the default."""
    runs = []
    for one in sweep(settings, BASE):
        steps = one.tokens // one.batch_tokens
        rate = one.lr / default_lr(one.d_sae) / 1.9
        loss = float(LAW.at(np.array([[one.d_sae], [steps]], float))[0]) * (1 + 0.02 * np.log(rate) ** 2)
        runs.append(Run(one.d_sae, one.k, one.tokens, steps, one.lr, loss * (4 / one.k) ** 0.2, 0.0, 1.0))
    return Scaling(runs, settings, BASE)


def test_the_sweep_is_a_grid_with_other_rates_along_its_diagonal_and_other_k_at_its_middle():
    runs = sweep(SWEEP, BASE)
    usual = [run for run in runs if run.k == 4 and run.lr == 2 * default_lr(run.d_sae)]
    assert {(run.d_sae, run.tokens) for run in usual} == {(d, t) for d in SWEEP.d_sae for t in SWEEP.tokens}
    rates = [(run.d_sae, run.tokens) for run in runs if run.lr == 0.5 * default_lr(run.d_sae)]
    assert rates == [(16, 2048), (32, 4096)]
    assert {(run.d_sae, run.k, run.tokens) for run in runs if run.k != 4} == {
        (d, k, 4096) for d in SWEEP.d_sae for k in (2, 6)
    }  # fmt: skip
    assert len(runs) == 9 + 2 + 6 == len(set(map(DictionarySettings.fingerprint, runs)))
    assert len(sweep(ScalingSettings(), DictionarySettings())) >= 20


def test_a_run_of_the_sweep_is_the_run_alone(source: Activations, site: Path, scaling: Scaling):
    x = held_out(Activations.open(site, "held_out"), SWEEP.evaluation_tokens)
    one = sweep(SWEEP, BASE)[4]
    training = Training(one, source)
    for _ in training.run(source):
        pass
    alone = measure(at_l0(training.dictionary(), x, 4.0), [x])
    run = scaling.runs[4]
    assert (run.d_sae, run.tokens, run.steps) == (one.d_sae, one.tokens, training.n_steps)
    assert run.fvu == pytest.approx(alone.fvu, rel=1e-5)
    assert alone.l0 == pytest.approx(4, abs=0.01)


def test_a_real_sweep_falls_with_steps_and_its_laws_explain_it(scaling: Scaling, swept: tuple[Path, dict]):
    for d_sae in SWEEP.d_sae:
        losses = [run.fvu for run in sorted(scaling.grid) if run.d_sae == d_sae]
        assert losses == sorted(losses, reverse=True)
    assert scaling.joint.r2 > 0.9
    assert all(a.compute < b.compute and a.fvu > b.fvu for a, b in pairwise(scaling.frontier))
    summary = json.loads(json.dumps(swept[1], allow_nan=False))
    assert summary["runs"] == 17
    assert summary["loss_exponent"] < 0
    text = (swept[0] / "scaling.md").read_text("utf-8")
    assert "17 runs, 9 of them d_sae by steps" in text
    assert sum(line.startswith(("| 16 |", "| 32 |", "| 64 |")) for line in text.splitlines()) == 17


def test_a_killed_sweep_goes_on_from_its_checkpoints(source: Activations, site: Path, tmp_path: Path):
    wanted, x = sweep(SWEEP, BASE)[:2], held_out(Activations.open(site, "held_out"), 256)
    first = [run for _, run, _ in train_sweep(wanted, source, x, tmp_path)]
    again: list[float] = []

    def report(done: int, total: int, unit: str, **values: float) -> None:
        again.append(done)

    second = [run for _, run, _ in train_sweep(wanted, source, x, tmp_path, report=report)]
    assert again == []  # not one step
    assert first == second


def test_optima_of_a_known_law_have_its_exponents_within_their_intervals():
    found = made_up(ScalingSettings(resamples=40))
    best = found.d_sae, found.steps
    assert all(best), "runs of equal compute show an optimum"
    for fit, true in zip(best, (LAW.d_sae_exponent, LAW.steps_exponent), strict=True):
        value = fit.interval(lambda law: law.exponent)
        assert value.low - 0.05 < true < value.high + 0.05
    (rate,) = [found.lr.interval(lambda law: law.exponent)] if found.lr else []
    sizes = [run.d_sae for run in found.grid]
    assert rate.value < 0  # the default falls with d_sae, which grows along the diagonal
    far = (8 * max(sizes), 4096)
    assert found.predict(*far).value == pytest.approx(float(LAW.at(np.array([[far[0]], [far[1]]], float))[0]), rel=0.01)
    assert found.sparsity
    assert found.sparsity.r2 > 0.99


def test_the_longest_of_each_size_is_kept_with_the_loss_that_is_told(swept: tuple[Path, dict], site: Path):
    x = held_out(Activations.open(site, "held_out"), SWEEP.evaluation_tokens)
    runs = {run.d_sae: run for run in Scaling.open(swept[0] / "scaling.json").grid if run.tokens == SWEEP.tokens[-1]}
    for d_sae, run in runs.items():
        assert measure(Dictionary.load(swept[0] / f"w{d_sae}"), [x]).fvu == pytest.approx(run.fvu, rel=1e-4)


def test_the_largest_run_is_foretold_from_those_of_an_eighth_of_its_compute():
    found = made_up(ScalingSettings(resamples=20)).held_out
    assert found
    smaller, largest = found
    assert (largest.d_sae, largest.tokens) == (2048, 1_048_576)
    assert max(run.compute for run in smaller.runs) == largest.compute / 8
    assert smaller.predict(largest.d_sae, largest.steps).value == pytest.approx(largest.fvu, rel=0.01)


def test_a_dictionary_without_k_is_refused_with_the_cure():
    for other in ({"architecture": "relu"}, {"architecture": "transcoder"}, {"source": "somewhere"}):
        with pytest.raises(ScalingError, match="give the study's first dictionary an architecture with a k"):
            sweep(SWEEP, DictionarySettings.model_validate(other))


def test_sizes_that_do_not_rise_are_refused():
    for sizes in ([64, 64, 128], [0, 1, 2], [64, 128]):
        with pytest.raises(ValidationError):
            ScalingSettings(d_sae=sizes)
