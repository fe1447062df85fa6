"""The hand-written step against autograd on a dense version of the same loss."""

import pytest
import torch

from sae_core.dictionary import weights as weights_module
from sae_core.dictionary.architecture import Step
from sae_core.dictionary.batch_top_k import BatchTopK
from sae_core.dictionary.weights import Learner, Weights

D_MODEL, D_SAE, K, N = 16, 48, 4, 40
VARIANCE = 13.0


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 everywhere, so that values may be compared closely; bfloat16 has tests of its own."""
    monkeypatch.setattr("sae_core.dictionary.sparse.encoder_dtype", lambda device: torch.float32)


def learner(seed: int = 0) -> Learner:
    """Weights away from their initial values, with b_dec and b_enc other than zero."""
    generator = torch.Generator().manual_seed(seed)
    weights = Weights.initial(D_SAE, torch.randn(D_MODEL, generator=generator) * 0.3, seed)
    weights.W_enc.add_(torch.randn(D_SAE, D_MODEL, generator=generator) * 0.2)
    weights.b_enc.add_(torch.randn(D_SAE, generator=generator) * 0.2)
    return Learner(weights)


def inputs(n: int = N, seed: int = 5) -> torch.Tensor:
    return torch.randn(n, D_MODEL, generator=torch.Generator().manual_seed(seed))


def dense_loss(weights: list[torch.Tensor], x: torch.Tensor, dead: torch.Tensor, coefficient: float) -> torch.Tensor:
    """The loss of the class docstring, written densely."""
    W_enc, b_enc, W_dec, b_dec = weights
    z = (x - b_dec) @ W_enc.T + b_enc
    smallest = z.flatten().sort(descending=True).values[K * len(x) - 1]
    f = torch.where((z >= smallest) & (z > 0), z, 0.0)
    residual = x - (f @ W_dec + b_dec)
    loss = residual.square().sum() / len(x) / VARIANCE
    if dead.any() and coefficient:
        target = residual.detach()
        k_aux = D_MODEL // 2
        z_dead = z[:, dead]
        top = z_dead.topk(min(k_aux, z_dead.shape[1]), dim=1)
        acts = torch.zeros_like(z_dead).scatter(1, top.indices, top.values.relu())
        error = (acts @ W_dec[dead] - target).square().sum() / (target - target.mean(0)).square().sum()
        loss = loss + coefficient * min(int(dead.sum()) / k_aux, 1.0) * error
    return loss


def step(dead: torch.Tensor, coefficient: float) -> tuple[Step, Learner]:
    """One step, and the learner with its gradients."""
    learned = learner()
    return BatchTopK(K, coefficient, VARIANCE).step(learned, inputs(), dead, progress=0.5), learned


@pytest.mark.parametrize("n_dead", [0, 1, D_MODEL // 2, D_MODEL // 2 + 1, D_SAE])
def test_gradients_equal_those_of_autograd(n_dead: int) -> None:
    dead = torch.arange(D_SAE) < n_dead
    _, learned = step(dead, coefficient=0.5)
    leaves = [tensor.clone().requires_grad_() for tensor in learned.weights.tensors()]
    expected = torch.autograd.grad(dense_loss(leaves, inputs(), dead, 0.5), leaves)
    for name, ours, theirs in zip(
        ("W_enc", "b_enc", "W_dec", "b_dec"), learned.gradients.tensors(), expected, strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")


def test_aux_k_leaves_the_living_alone() -> None:
    dead = torch.arange(D_SAE) < 5
    with_aux, without = (step(dead, coefficient)[1].gradients for coefficient in (1.0, 0.0))
    assert torch.equal(with_aux.W_dec[5:], without.W_dec[5:])
    assert torch.equal(with_aux.W_enc[5:], without.W_enc[5:])
    assert not torch.equal(with_aux.W_dec[:5], without.W_dec[:5])


def test_aux_loss_grows_with_the_number_of_dead_features() -> None:
    """The factor is n_dead / k_aux up to 1: without it a handful would be asked to explain everything."""
    one, _ = step(torch.arange(D_SAE) < 1, coefficient=1.0)
    assert 0 < one.aux < 2 / (D_MODEL // 2)


def test_exactly_k_times_batch_are_selected_and_they_are_the_largest() -> None:
    learned, x = learner(), inputs()
    architecture = BatchTopK(K, 0.0, VARIANCE)
    centered = x - learned.weights.b_dec
    z = centered @ learned.weights.W_enc.T + learned.weights.b_enc
    for guess in (None, 0.01, 0.7, 50.0):  # the running threshold may be far off: the selection must not depend on it
        if guess is not None:
            architecture._smallest = torch.tensor([guess, 1.0], dtype=torch.float64)
        pairs, value = architecture.select(learned, centered)
        assert len(value) == K * N
        torch.testing.assert_close(value.sort().values, z.flatten().topk(K * N).values.sort().values)
        torch.testing.assert_close(value, z[pairs.row.long(), pairs.feature.long()])


def test_ties_are_cut_to_exactly_k_times_batch() -> None:
    learned = learner()
    x = inputs(1).repeat(N, 1)  # every value is there N times
    pairs, value = BatchTopK(K, 0.0, VARIANCE).select(learned, x)
    assert len(value) == K * N
    assert len(set(zip(pairs.row.tolist(), pairs.feature.tolist(), strict=True))) == K * N


def test_fewer_positive_values_than_wanted_are_all_selected() -> None:
    learned = learner()
    learned.weights.b_enc.fill_(-2.5)
    centered = inputs()
    z = centered @ learned.weights.W_enc.T + learned.weights.b_enc
    expected = int((z > 0).sum())
    assert 0 < expected < K * N
    _, value = BatchTopK(K, 0.0, VARIANCE).select(learned, centered)
    assert len(value) == expected
    assert value.min() > 0


def test_nothing_positive_selects_nothing_and_still_steps() -> None:
    learned = learner()
    learned.weights.b_enc.fill_(-100.0)
    taken = BatchTopK(K, 0.0, VARIANCE).step(learned, inputs(), torch.zeros(D_SAE, dtype=torch.bool), progress=0.5)
    assert taken.n_active == 0
    assert taken.n_fired.sum() == 0
    assert all(gradient.isfinite().all() for gradient in learned.gradients.tensors())


def test_running_threshold_is_an_average_without_the_pull_of_its_start() -> None:
    learned, architecture = learner(), BatchTopK(K, 0.0, VARIANCE)
    assert architecture.threshold == 0
    _, value = architecture.select(learned, inputs())
    assert architecture.threshold == pytest.approx(float(value.min()))  # one batch: its own value, not a tenth of it


def test_running_threshold_goes_on_after_a_restart() -> None:
    learned, architecture = learner(), BatchTopK(K, 0.0, VARIANCE)
    architecture.select(learned, inputs())
    again = BatchTopK(K, 0.0, VARIANCE).restore(architecture.state())
    assert again.threshold == architecture.threshold


def test_bfloat16_product_selects_what_float32_selects(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proposals come from bfloat16 with room to spare, and are decided in float32: nothing is lost."""
    learned, x = learner(), inputs(256)
    exact_pairs, exact_value = BatchTopK(K, 0.0, VARIANCE).select(learned, x)
    for module in ("sparse", "weights"):
        monkeypatch.setattr(f"sae_core.dictionary.{module}.low_precision", torch.Tensor.bfloat16)
    monkeypatch.setattr("sae_core.dictionary.architecture.low_precision", torch.Tensor.bfloat16)
    pairs, value = BatchTopK(K, 0.0, VARIANCE).select(weights_module.Learner(learned.weights), x)
    assert torch.equal(pairs.row, exact_pairs.row)
    assert torch.equal(pairs.feature, exact_pairs.feature)
    assert torch.equal(value, exact_value)
