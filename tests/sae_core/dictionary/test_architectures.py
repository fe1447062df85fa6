"""Every architecture's hand-written step against autograd on its formula, written plainly and densely."""

from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch

from sae_core.dictionary.architectures import architecture
from sae_core.dictionary.gated import Gated
from sae_core.dictionary.jump_relu import BANDWIDTH, JumpReLU
from sae_core.dictionary.jump_relu_tanh import JumpReLUTanh
from sae_core.dictionary.matryoshka import MatryoshkaBatchTopK
from sae_core.dictionary.relu import ReLU
from sae_core.dictionary.top_k import TopK
from sae_core.dictionary.weights import Learner, Weights
from sae_core.study import Architecture, DictionarySettings

D_MODEL, D_SAE, K, N = 16, 48, 4, 40
VARIANCE = 13.0
NO_DEAD = torch.zeros(D_SAE, dtype=torch.bool)


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 everywhere, so that values may be compared closely."""
    monkeypatch.setattr("sae_core.dictionary.sparse.encoder_dtype", lambda device: torch.float32)


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def weights() -> Weights:
    """Away from their initial values, with biases other than zero."""
    made = Weights.initial(D_SAE, 0.3 * normal(D_MODEL, seed=1), 0)
    made.W_enc.add_(0.2 * normal(D_SAE, D_MODEL, seed=2))
    made.b_enc.add_(0.2 * normal(D_SAE, seed=3))
    return made


def inputs() -> torch.Tensor:
    return normal(N, D_MODEL, seed=5)


def gradients(trained: Any, dead: torch.Tensor, progress: float = 0.5) -> Weights:
    learner = Learner(trained.start(weights()))
    trained.step(learner, inputs(), dead, progress)
    return learner.gradients


def pre_acts(w: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    return (x - w[3]) @ w[0].T + w[1]


def squared(w: list[torch.Tensor], x: torch.Tensor, f: torch.Tensor) -> torch.Tensor:
    return (x - f @ w[2] - w[3]).square().sum() / len(x)


def top_k_loss(w: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    top = pre_acts(w, x).topk(K, dim=1)
    f = torch.zeros(N, D_SAE).scatter(1, top.indices, top.values.relu())
    return squared(w, x, f) / VARIANCE


def matryoshka_loss(w: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    z = pre_acts(w, x)
    smallest = z.flatten().sort(descending=True).values[K * N - 1]
    f = torch.where((z >= smallest) & (z > 0), z, 0.0)
    prefixes = [2, 3, 6, 12, 48]  # 48 / 32 is 1.5
    parts = [squared(w, x, torch.where(torch.arange(D_SAE) < end, f, 0.0)) for end in prefixes]
    return torch.stack(parts).mean() / VARIANCE


def relu_loss(w: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    f = pre_acts(w, x).relu()
    return (squared(w, x, f) + 3.0 * (f * w[2].norm(dim=1).detach()).sum() / N) / VARIANCE


def gated_loss(w: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    W_enc, b_gate, W_dec, b_dec, b_mag, r_mag = w
    gate = (x - b_dec) @ W_enc.T + b_gate
    f = (gate > 0) * ((x - b_dec) @ (W_enc * r_mag.exp()[:, None]).T + b_mag).relu()
    via_gate = gate.relu() @ W_dec.detach() + b_dec.detach()
    penalized = squared(w, x, f) + 3.0 * gate.relu().sum() / N
    return (penalized + (x - via_gate).square().sum() / N) / VARIANCE


class Above(torch.autograd.Function):
    """H(z - threshold), whose gradient for the threshold is -1 / BANDWIDTH near it."""

    @staticmethod
    def forward(context: Any, z: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
        context.save_for_backward((z - threshold).abs() < BANDWIDTH / 2)
        return (z > threshold).float()

    @staticmethod
    def backward(context: Any, upstream: torch.Tensor) -> tuple[None, torch.Tensor]:
        return None, (-upstream * context.saved_tensors[0] / BANDWIDTH).sum(0)


class Jump(torch.autograd.Function):
    """z H(z - threshold): z's gradient where it is active, and -threshold / BANDWIDTH near the threshold."""

    @staticmethod
    def forward(context: Any, z: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
        context.save_for_backward(z, threshold)
        return z * (z > threshold)

    @staticmethod
    def backward(context: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z, threshold = context.saved_tensors
        near = (z - threshold).abs() < BANDWIDTH / 2
        return upstream * (z > threshold), (-upstream * near * threshold / BANDWIDTH).sum(0)


def jump_relu_loss(w: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    z = pre_acts(w, x)
    l0 = Above.apply(z, w[4]).sum() / N
    return squared(w, x, Jump.apply(z, w[4])) / VARIANCE + (l0 / K - 1) ** 2


class JumpToAll(Jump):
    """As Jump, with a window of 2, and z's gradient is threshold / 2 there, besides."""

    @staticmethod
    def backward(context: Any, upstream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        z, threshold = context.saved_tensors
        jump = upstream * ((z - threshold).abs() < 1) * threshold / 2
        return upstream * (z > threshold) + jump, -jump.sum(0)


def jump_relu_tanh_loss(w: list[torch.Tensor], x: torch.Tensor) -> torch.Tensor:
    z = pre_acts(w, x)
    f = JumpToAll.apply(z, w[4])
    penalty = 0.5 * 3 * (4 * f).tanh().sum() / N  # half of the steps are done
    lacking = 3e-6 * (w[4] - z).relu().sum() / N
    return (squared(w, x, f) + penalty + lacking) / VARIANCE


@pytest.mark.parametrize(
    ("trained", "loss"),
    [
        (TopK(K, 0.0, VARIANCE), top_k_loss),
        (MatryoshkaBatchTopK(K, 0.0, VARIANCE), matryoshka_loss),
        (ReLU(3.0, VARIANCE), relu_loss),
        (Gated(3.0, VARIANCE), gated_loss),
        (JumpReLU(K, 0.0, VARIANCE), jump_relu_loss),
        (JumpReLUTanh(3.0, VARIANCE), jump_relu_tanh_loss),
    ],
    ids=lambda value: type(value).__name__,
)
def test_gradients_equal_those_of_autograd(trained: Any, loss: Callable[..., torch.Tensor]) -> None:
    started = trained.start(weights())
    if started.threshold is not None:
        started.threshold.add_(0.3 * normal(D_SAE, seed=4)).clamp_(min=0)
    for magnitude in (started.b_mag, started.r_mag):
        if magnitude is not None:
            magnitude.add_(0.3 * normal(D_SAE, seed=4))
    learner = Learner(started)
    step = trained.step(learner, inputs(), NO_DEAD, progress=0.5)
    leaves = [tensor.clone().requires_grad_() for tensor in started.tensors()]
    expected = torch.autograd.grad(loss(leaves, inputs()), leaves)
    assert step.n_active > 0
    assert int(step.n_fired.sum()) == step.n_active
    for (name, ours), theirs in zip(learner.gradients.state("of").items(), expected, strict=True):
        assert theirs.any(), name
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_top_k_selects_the_largest_of_every_row() -> None:
    learner = Learner(weights())
    pairs, value = TopK(K, 0.0, VARIANCE).select(learner, inputs())
    z = inputs() @ learner.weights.W_enc.T + learner.weights.b_enc
    assert torch.bincount(pairs.row).tolist() == [K] * N
    by_row = value[pairs.row.argsort(stable=True)].view(N, K).sort(descending=True).values
    torch.testing.assert_close(by_row, z.topk(K, dim=1).values)
    place = pairs.feature.long() * N + pairs.row
    assert len(place.unique()) == len(place)


def test_top_k_selects_nothing_that_is_not_positive() -> None:
    learner = Learner(weights())
    learner.weights.b_enc.fill_(-2.5)
    _, value = TopK(K, 0.0, VARIANCE).select(learner, inputs())
    assert 0 < len(value) < K * N
    assert value.min() > 0


@pytest.mark.parametrize("trained", [ReLU, Gated])
def test_the_penalty_is_warmed_over_the_first_steps(trained: Any) -> None:
    b_enc = [gradients(trained(3.0, VARIANCE), NO_DEAD, at).b_enc for at in (0.0, 0.025, 0.05, 1.0)]
    torch.testing.assert_close(b_enc[1] - b_enc[0], (b_enc[2] - b_enc[0]) / 2)
    assert torch.equal(b_enc[2], b_enc[3])


@pytest.mark.parametrize("trained", [ReLU, Gated, JumpReLUTanh])
def test_blocks_together_are_the_batch_at_once(trained: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = gradients(trained(3.0, VARIANCE), NO_DEAD)
    monkeypatch.setattr("sae_core.dictionary.sparse.BLOCK_BYTES", {"cpu": 7 * D_SAE * 4})
    parts = gradients(trained(3.0, VARIANCE), NO_DEAD)
    for a, b in zip(whole.tensors(), parts.tensors(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_thresholds_of_jump_relu_start_where_random_directions_have_the_wanted_l0() -> None:
    started = JumpReLU(32, 0.0, 48.0).start(Weights.initial(4096, torch.zeros(64), 0))
    z = normal(2000, 64, seed=0) * (48 / 64) ** 0.5 @ started.W_enc.T
    assert float((z > started.threshold).sum(1).float().mean()) == pytest.approx(32, rel=0.1)


@pytest.mark.parametrize("trained", [TopK, MatryoshkaBatchTopK, JumpReLU])
def test_the_dead_learn_from_the_auxiliary_loss_and_the_living_do_not(trained: Any) -> None:
    dead = torch.arange(D_SAE) < 5
    without = gradients(trained(K, 0.0, VARIANCE), dead).W_dec
    with_aux = gradients(trained(K, 1.0, VARIANCE), dead).W_dec
    assert torch.equal(with_aux[5:], without[5:])
    assert not torch.equal(with_aux[:5], without[:5])


def test_silent_features_of_the_tanh_recipe_are_pulled_to_their_thresholds() -> None:
    """Far from their thresholds nothing else moves them: by PRE_ACT / variance each input."""
    trained = JumpReLUTanh(3.0, VARIANCE)
    started = trained.start(weights())
    started.b_enc.fill_(-100.0)
    learner = Learner(started)
    assert trained.step(learner, inputs(), NO_DEAD, progress=0.5).n_active == 0
    torch.testing.assert_close(learner.gradients.b_enc, torch.full((D_SAE,), -3e-6 / VARIANCE), rtol=1e-4, atol=0)
    assert learner.gradients.threshold is not None
    torch.testing.assert_close(learner.gradients.threshold, torch.full((D_SAE,), 3e-6 / VARIANCE), rtol=1e-4, atol=0)


@pytest.mark.parametrize(("d_sae", "wanted"), [(2048, 1024), (40_000, 10_000)])
def test_the_tanh_recipe_starts_with_ten_thousand_active_features_or_half(d_sae: int, wanted: int) -> None:
    started = JumpReLUTanh(5.0, 48.0).start(Weights.initial(d_sae, torch.zeros(64), 0))
    z = normal(200, 64, seed=0) * (48 / 64) ** 0.5 @ started.W_enc.T + started.b_enc
    assert float((z > started.threshold).sum(1).float().mean()) == pytest.approx(wanted, rel=0.05)


def test_the_penalty_of_the_tanh_recipe_is_warmed_over_the_whole_run() -> None:
    b_enc = [gradients(JumpReLUTanh(3.0, VARIANCE), NO_DEAD, at).b_enc for at in (0.0, 0.5, 1.0)]
    torch.testing.assert_close(b_enc[1] - b_enc[0], (b_enc[2] - b_enc[0]) / 2)
    assert not torch.equal(b_enc[2], b_enc[0])


def test_jump_relu_with_every_feature_wanted_starts_at_zero() -> None:
    threshold = JumpReLU(D_SAE, 0.0, VARIANCE).start(weights()).threshold
    assert threshold is not None
    assert not threshold.any()


@pytest.mark.parametrize("name", get_args(Architecture))
def test_every_architecture_has_a_class_of_its_own(name: str) -> None:
    made = {
        type(architecture(DictionarySettings.model_validate({"architecture": a}), 1.0)) for a in (name, "batch_top_k")
    }
    assert len(made) == (1 if name == "batch_top_k" else 2)
