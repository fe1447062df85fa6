"""Laws fitted to data of a known law: what went in comes out, and the interval holds it."""

import numpy as np
import pytest

from sae_core.science.laws import JointLaw, LawError, PowerLaw, SparsityLaw, better, bootstrap, lowest

RNG = np.random.default_rng
COMPUTE = np.geomspace(1e4, 1e7, 12)
SIZES = np.stack(np.meshgrid(2.0 ** np.arange(7, 12), 2.0 ** np.arange(5, 10))).reshape(2, -1)
SPARSITIES = np.stack(np.meshgrid([512.0, 1024, 2048, 4096], [8.0, 16, 32, 64])).reshape(2, -1)
POWER, FLOORED = PowerLaw(3.0, -0.3), PowerLaw(30.0, -0.4, 0.2)
JOINT = JointLaw(floor=0.1, a=2.0, alpha=0.8, b=1.5, beta=1.0, gamma=0.5)
SPARSITY = SparsityLaw(a=0.5, b_k=-0.2, b_n=-0.15, g=-0.01, z=-2.5, e=-0.1)


def noise(n: int, seed: int) -> np.ndarray:
    return np.exp(RNG(seed).normal(0, 0.005, n))


@pytest.mark.parametrize("seed", range(3))
def test_the_exponent_of_a_known_power_law_lies_in_the_interval(seed: int):
    fit = bootstrap(PowerLaw.fit, COMPUTE, POWER.at(COMPUTE) * noise(12, seed), 200)
    found = fit.interval(lambda law: law.exponent)
    assert found.low < -0.3 < found.high
    assert found.high - found.low < 0.01
    assert fit.r2 > 0.999


def test_a_floor_is_seen_where_there_is_one_and_only_there():
    floored, straight = FLOORED.at(COMPUTE) * noise(12, 0), POWER.at(COMPUTE) * noise(12, 1)
    assert better(COMPUTE, straight) == PowerLaw.fit
    assert better(COMPUTE, floored) == PowerLaw.fit_above_floor
    fit = bootstrap(PowerLaw.fit_above_floor, COMPUTE, floored, 100)
    for name, true in vars(FLOORED).items():
        found = fit.interval(lambda law, name=name: getattr(law, name))
        assert found.low < true < found.high, name


def test_the_joint_law_is_recovered_and_foretells_a_run_eight_times_as_large():
    far, held = np.array([[4096.0], [2048.0]]), []
    for seed in range(2):
        fit = bootstrap(JointLaw.fit, SIZES, JOINT.at(SIZES) * noise(SIZES.shape[1], seed), 30)
        found = {name: fit.interval(lambda law, name=name: getattr(law, name)) for name in vars(JOINT)}
        held += [found[name].low < true < found[name].high for name, true in vars(JOINT).items()]
        foretold = fit.predict(far)
        assert foretold.low < float(JOINT.at(far)[0]) < foretold.high
        assert foretold.value == pytest.approx(float(JOINT.at(far)[0]), rel=0.03)
    assert sum(held) >= 9  # of 12 intervals at 95%


def test_the_optimal_size_of_the_joint_law_is_the_least_loss_that_a_search_finds():
    compute = 3e6
    d_sae = np.geomspace(10, 1e5, 200_001)
    searched = d_sae[np.argmin(JOINT.at(np.stack([d_sae, compute / d_sae])))]
    assert JOINT.optimal_d_sae(compute) == pytest.approx(searched, rel=1e-3)
    assert JOINT.optimal_d_sae(1e6 * compute) / JOINT.optimal_d_sae(compute) == pytest.approx(1e6**JOINT.d_sae_exponent)
    assert JOINT.d_sae_exponent + JOINT.steps_exponent == pytest.approx(1)


def test_the_law_of_size_and_sparsity_fits_what_it_made_and_foretells_between():
    fit = bootstrap(SparsityLaw.fit, SPARSITIES, SPARSITY.at(SPARSITIES) * noise(16, 0), 20)
    assert fit.r2 > 0.99
    between = np.array([[1500.0], [24.0]])
    assert fit.predict(between).value == pytest.approx(float(SPARSITY.at(between)[0]), rel=0.01)


def test_the_lowest_point_is_that_of_the_parabola_whatever_the_order_and_none_at_an_end():
    x = np.array([64.0, 8, 16, 32])
    y = np.exp(0.1 * (np.log(x) - np.log(20)) ** 2)
    assert lowest(x, y) == pytest.approx(20)
    assert lowest(x, x) is None
    assert lowest(x[:2], y[:2]) is None


@pytest.mark.parametrize(("law", "x"), [
    (PowerLaw.fit, np.ones(5)), (PowerLaw.fit_above_floor, np.arange(1.0, 4)), (JointLaw.fit, np.ones((2, 9))),
    (JointLaw.fit, SIZES[:, :4]), (SparsityLaw.fit, SPARSITIES[:, :6]),
])  # fmt: skip
def test_too_few_sizes_are_refused_with_the_cure(law, x: np.ndarray):
    with pytest.raises(LawError, match=r"too few for a law.*give the sweep more sizes"):
        law(x, np.ones(x.shape[-1]))
