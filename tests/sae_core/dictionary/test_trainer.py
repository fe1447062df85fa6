"""Training: a planted dictionary is found, kill and resume change no bit, failures say where and what."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import pytest
import torch

from sae_core.dictionary import Dictionary
from sae_core.dictionary.center import geometric_median
from sae_core.dictionary.trainer import StepMetrics, Training, TrainingError, learning_rate
from sae_core.dictionary.weights import Weights
from sae_core.study import Architecture, DictionarySettings
from sae_core.training import calibrate

ARCHITECTURES = [name for name in get_args(Architecture) if name != "transcoder"]  # which reads pairs of sites
D_MODEL, N_TRUE = 64, 256
COEFFICIENTS = {"relu": 1, "gated": 1, "jump_relu_tanh": 0.5}
OFTEN = 0.008
"""Bound on the firing rate from which a planted feature must be found."""


class InMemory:
    """Activations in a tensor, read as the stored ones are."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x, self.n_kept, self.d_model = x, len(x), x.shape[1]

    def statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.x.float()
        return x.mean(0), x.square().sum(1).mean()[None]

    def batches(self, batch_tokens: int, n_steps: int, seed: int, start_step: int = 0) -> Iterator[torch.Tensor]:
        a_pass = self.n_kept // batch_tokens
        for step in range(start_step, n_steps):
            epoch, part = divmod(step, a_pass)
            order = torch.randperm(self.n_kept, generator=torch.Generator().manual_seed(seed + 1000 * epoch))
            yield self.x[order[part * batch_tokens : (part + 1) * batch_tokens]]


def planted(n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, the true directions, and how often each fires: four on a token, the rate falling as 1 / sqrt(rank)."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(N_TRUE, D_MODEL, generator=generator), dim=1)
    rates = torch.arange(1, N_TRUE + 1).float().rsqrt()
    rates *= 4 / rates.sum()
    f = (torch.rand(n, N_TRUE, generator=generator) < rates) * (0.5 + torch.rand(n, N_TRUE, generator=generator))
    return f @ directions + 0.01 * torch.randn(n, D_MODEL, generator=generator) + 0.3, directions, rates


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Arrays this small are slower on several threads, and far slower on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def source() -> InMemory:
    return InMemory(planted(20_000)[0])


def small(**changes: float | str) -> DictionarySettings:
    architecture = changes.get("architecture")
    sparsity = {"l1_coefficient": COEFFICIENTS[str(architecture)]} if architecture in COEFFICIENTS else {"k": 4}
    values = {"d_sae": 96, "tokens": 256 * 24, "batch_tokens": 256, "dead_after_tokens": 1000} | sparsity | changes
    return DictionarySettings.model_validate(values)


def test_the_decoders_bias_starts_at_the_mean_or_at_the_geometric_median(source: InMemory) -> None:
    for start, expected in (("mean", source.x.mean(0)), ("geometric_median", geometric_median(source.x[:19_968]))):
        training = Training(small(b_dec_start=start), source)
        b_dec = training.learner.weights.b_dec / training.scaling.scale
        torch.testing.assert_close(b_dec, expected, rtol=1e-2, atol=1e-2)


def train(training: Training, source: InMemory) -> list[StepMetrics]:
    return list(training.run(source))


def assert_same_bits(a: Dictionary, b: Dictionary) -> None:
    for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"):
        assert torch.equal(getattr(a, name), getattr(b, name)), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_planted_dictionary_is_recovered(architecture: str) -> None:
    """Every planted feature that fires on at least 0.8% of the tokens has a learned one at cosine 0.9, on average."""
    x, directions, rates = planted(40_000)
    settings = small(architecture=architecture, d_sae=N_TRUE, tokens=400 * 512, batch_tokens=512)
    training = Training(settings, InMemory(x))
    metrics = train(training, InMemory(x))
    cosine = (training.dictionary().W_dec @ directions.T).max(dim=0).values
    assert (rates >= OFTEN).all()
    assert float(cosine.mean()) >= 0.9
    assert metrics[-1].fvu < 0.25
    assert metrics[-1].dead == 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("stop", [1, 11, 23])
def test_a_resumed_run_gives_the_same_bits(stop: int, architecture: str, source: InMemory, tmp_path: Path) -> None:
    settings = small(architecture=architecture)
    whole = Training(settings, source)
    expected = train(whole, source)
    first = Training(settings, source)
    steps = first.run(source)
    for _ in range(stop):
        next(steps)
    first.save(tmp_path / "checkpoint")
    next(steps)  # what was done after the checkpoint is lost
    second = Training(settings, source).restore(tmp_path / "checkpoint")
    assert second.done == stop
    train(second, source)
    assert second.history == expected
    assert_same_bits(second.dictionary(), whole.dictionary())


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(source: InMemory) -> None:
    runs = [Training(small(seed=seed), source) for seed in (0, 0, 1)]
    for run in runs:
        train(run, source)
    one, again, other = (run.dictionary() for run in runs)
    assert_same_bits(one, again)
    assert not torch.equal(one.W_dec, other.W_dec)


def acts(weights: Weights, thresholds: float | torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """What an architecture says that its features do on scaled inputs."""
    u = (x - weights.b_dec) @ weights.W_enc.T
    z = u + weights.b_enc
    if weights.b_mag is None or weights.r_mag is None:
        return z * (z > thresholds)
    return (u * weights.r_mag.exp() + weights.b_mag).relu() * (z > 0)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_folding_leaves_reconstructions_unchanged(architecture: str, source: InMemory) -> None:
    training = Training(small(architecture=architecture), source)
    train(training, source)
    dictionary, weights, scale = training.dictionary(), training.learner.weights, training.scaling.scale
    x = source.x[:64]
    f = acts(weights, training.architecture.thresholds(weights), x * scale)
    assert 0 < int((f > 0).sum()) < f.numel()
    x_hat = (f @ weights.W_dec + weights.b_dec) / scale
    torch.testing.assert_close(dictionary.decode(dictionary.encode(x)), x_hat, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dictionary.encode(x), f / scale, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dictionary.W_dec.norm(dim=1), torch.ones(dictionary.d_sae))


@pytest.mark.parametrize("architecture", ["batch_top_k", "top_k", "matryoshka_batch_top_k"])
def test_a_saved_threshold_gives_the_trained_l0_on_unseen_activations(architecture: str, tmp_path: Path) -> None:
    """In training ranks within the batch select k = 4 features a token; the file knows nothing but a threshold."""
    x = planted(24_000)[0]
    source, unseen = InMemory(x[:20_000]), x[20_000:]
    training = Training(small(architecture=architecture, tokens=256 * 200), source)
    trained_l0 = train(training, source)[-1].l0
    calibrate(training.dictionary(), source.batches(256, 40, seed=0), 4).save(tmp_path)
    l0 = len(Dictionary.load(tmp_path).encode_sparse(unseen).value) / len(unseen)
    assert l0 == pytest.approx(trained_l0, rel=0.05)


def test_learning_does_not_depend_on_the_units_of_the_activations(source: InMemory) -> None:
    """Inputs are scaled to E|x|^2 = d_model, so activations a hundred times larger train alike."""
    small_units, large_units = Training(small(), source), Training(small(), InMemory(source.x * 128))
    a, b = train(small_units, source)[-1], train(large_units, InMemory(source.x * 128))[-1]
    assert b.fvu == pytest.approx(a.fvu, rel=1e-3)
    assert b.threshold == pytest.approx(a.threshold * 128, rel=1e-3)


def test_metrics_count_what_they_say(source: InMemory) -> None:
    training = Training(small(), source)
    metrics = train(training, source)
    assert [m.step for m in metrics] == list(range(1, 25))
    assert [m.tokens for m in metrics] == [256 * step for step in range(1, 25)]
    assert all(m.l0 == 4 for m in metrics)
    assert all(m.dead == 0 and m.aux == 0 for m in metrics[:4])  # nobody can have been silent for 1000 tokens yet
    assert metrics[-1].fvu < metrics[0].fvu


def test_dead_features_are_revived_by_the_auxiliary_loss(source: InMemory) -> None:
    def final_dead(aux_coefficient: float) -> float:
        training = Training(small(tokens=256 * 80, lr=2e-3, aux_coefficient=aux_coefficient), source)
        training.learner.weights.b_enc[:40] = -3.0  # forty features that never come first
        metrics = train(training, source)
        assert [m.dead for m in metrics[:4]] == [0] * 4  # nobody can have been silent for 1000 tokens yet
        assert metrics[4].dead > 0.3
        return metrics[-1].dead

    assert final_dead(1 / 32) < 0.5 * final_dead(0.0)


def test_nan_in_the_activations_stops_with_step_and_row(source: InMemory, tmp_path: Path) -> None:
    training = Training(small(), source)
    next(training.run(source))
    training.save(tmp_path / "checkpoint")
    before = training.learner.weights.W_enc.clone()
    batch = source.x[:256].clone()
    batch[7, 3] = torch.nan
    expected = r"step 2, activations 256 to 511.*row 7 .*NaN.*checkpoint: step 1 in .*checkpoint"
    with pytest.raises(TrainingError, match=expected):
        training.learn(batch)
    assert torch.equal(training.learner.weights.W_enc, before)


def test_a_loss_that_diverges_stops_and_names_the_learning_rate(source: InMemory) -> None:
    training = Training(small(lr=1e4, lr_warmup=0.0), source)
    with pytest.raises(TrainingError, match=r"step \d+.*diverged.*lower lr.*none was written"):
        train(training, source)


def test_too_few_activations_are_refused() -> None:
    with pytest.raises(TrainingError, match="100 activations are fewer than one batch of 256"):
        Training(small(), InMemory(torch.randn(100, 8)))


def test_a_checkpoint_of_other_settings_is_refused(source: InMemory, tmp_path: Path) -> None:
    training = Training(small(), source)
    training.save(tmp_path / "checkpoint")
    other = small(seed=1)
    with pytest.raises(TrainingError, match=f"{small().fingerprint()}.*{other.fingerprint()}"):
        Training(other, source).restore(tmp_path / "checkpoint")


def test_a_damaged_checkpoint_is_refused(source: InMemory, tmp_path: Path) -> None:
    (tmp_path / "checkpoint").write_bytes(b"\x08\0\0\0\0\0\0\0not json")
    with pytest.raises(TrainingError, match="damaged"):
        Training(small(), source).restore(tmp_path / "checkpoint")


def test_learning_rate_rises_holds_and_falls() -> None:
    settings = small(lr=1.0, lr_warmup=0.1, lr_decay=0.2)
    rates = [learning_rate(settings, step, 100) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 11)
    assert rates[10:79] == [1.0] * 69
    assert rates[99] == pytest.approx(1 / 21)
    assert all(rate > 0 for rate in rates)
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_default_learning_rate_falls_with_the_root_of_the_width() -> None:
    assert learning_rate(small(d_sae=2**14), 500, 1000) == pytest.approx(1e-3)
    assert learning_rate(small(d_sae=2**12), 500, 1000) == pytest.approx(2e-3)
    assert math.isclose(learning_rate(small(d_sae=2**12, lr_warmup=0.0, lr_decay=0.0), 0, 1), 2e-3)
