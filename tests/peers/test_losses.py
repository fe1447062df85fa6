"""Losses and gradients of one step against SAELens's training classes, on the same weights and batch.

Differences that hold for all: our loss is divided by the inputs' variance, and W_enc lies transposed. Decoder rows are
unit here, so the penalties of SAELens, which weigh an activation by its row's norm, have the same values; what they add
to the gradient of W_dec lies along each row, where `Learner.update` removes it, and so does the comparison. Other
differences are said where they matter.

What cannot run because SAELens is missing is skipped, and the summary of the tests names it.
"""

import importlib
import warnings
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_core.dictionary.architecture import Architecture, Step
from sae_core.dictionary.gated import Gated
from sae_core.dictionary.jump_relu import BANDWIDTH, JumpReLU
from sae_core.dictionary.jump_relu_tanh import JumpReLUTanh
from sae_core.dictionary.relu import ReLU
from sae_core.dictionary.top_k import TopK
from sae_core.dictionary.weights import Learner, Weights

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]

D_MODEL, D_SAE, K, N = 32, 128, 8, 60
VARIANCE = 17.0
COEFFICIENT = 2.5
NO_DEAD = torch.zeros(D_SAE, dtype=torch.bool)
OURS = {"b_gate": "b_enc"}
"""Our names of SAELens's parameters, where they differ: the bias of our gate is b_enc."""


@pytest.fixture(autouse=True)
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """float32 everywhere, so that values may be compared closely."""
    monkeypatch.setattr("sae_core.dictionary.sparse.encoder_dtype", lambda device: torch.float32)


def saelens(name: str, **settings: Any) -> Any:
    """A training class with random parameters and unit decoder rows, or a skip that says what is missing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            module = importlib.import_module(f"sae_lens.saes.{name.lower()}_sae")
        except ImportError as error:
            pytest.skip(f"NOT COMPARED with sae_lens: {error}")
    config = getattr(module, f"{name}TrainingSAEConfig")(d_in=D_MODEL, d_sae=D_SAE, **settings)
    sae = getattr(module, f"{name}TrainingSAE")(config)
    rng = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=rng))
        sae.W_dec /= sae.W_dec.norm(dim=1, keepdim=True)
        if hasattr(sae, "threshold"):
            sae.threshold.abs_()
    return sae


def x() -> Tensor:
    return torch.randn(N, D_MODEL, generator=torch.Generator().manual_seed(8)) + 0.2


def their_step(sae: Any, dead: Tensor = NO_DEAD, **coefficients: float) -> Any:
    inputs = importlib.import_module("sae_lens.saes.sae").TrainStepInput
    return sae.training_forward_pass(
        inputs(sae_in=x(), coefficients=coefficients, dead_neuron_mask=dead, n_training_steps=0, is_logging_step=False)
    )


def our_step(architecture: Architecture, sae: Any, dead: Tensor = NO_DEAD) -> tuple[Step, Learner]:
    """One step of ours with their weights, the penalty fully warmed up."""
    weights = architecture.start(Weights.initial(D_SAE, torch.zeros(D_MODEL), 0))
    for name, parameter in sae.named_parameters():
        own = getattr(weights, OURS.get(name, name))
        own.copy_(parameter.detach().T if name == "W_enc" else parameter.detach())
    learner = Learner(weights)
    return architecture.step(learner, x(), dead, progress=1.0), learner


def agree(loss: Tensor, sae: Any, learner: Learner, names: Sequence[str] = ()) -> None:
    """The gradients of their loss, for the named parameters or all, are VARIANCE times ours."""
    parameters = {name: p for name, p in sae.named_parameters() if not names or name in names}
    expected = torch.autograd.grad(loss, list(parameters.values()), retain_graph=True)
    for name, theirs in zip(parameters, expected, strict=True):
        ours = getattr(learner.gradients, OURS.get(name, name)) * VARIANCE
        theirs = theirs.T if name == "W_enc" else theirs
        if name == "W_dec":
            ours, theirs = (across(gradient, sae.W_dec.detach()) for gradient in (ours, theirs))
        assert theirs.any(), name
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"{name}: {m}")


def across(gradient: Tensor, rows: Tensor) -> Tensor:
    """What of a gradient does not lie along the rows."""
    return gradient - (gradient * rows).sum(1, keepdim=True) * rows


def test_relu() -> None:
    sae = saelens("Standard")
    theirs = their_step(sae, l1=COEFFICIENT)
    ours, learner = our_step(ReLU(COEFFICIENT, VARIANCE), sae)
    assert ours.squared_error / N == pytest.approx(float(theirs.losses["mse_loss"]), rel=1e-4)
    assert ours.aux * COEFFICIENT == pytest.approx(float(theirs.losses["l1_loss"]), rel=1e-4)
    agree(theirs.loss, sae, learner)


def test_gated() -> None:
    """SAELens's decoder learns from the gate's reconstruction, too; by the paper, and by us, it is a constant there."""
    sae = saelens("Gated")
    theirs = their_step(sae, l1=COEFFICIENT)
    ours, learner = our_step(Gated(COEFFICIENT, VARIANCE), sae)
    assert ours.squared_error / N == pytest.approx(float(theirs.losses["mse_loss"]), rel=1e-4)
    assert ours.aux * COEFFICIENT == pytest.approx(float(theirs.losses["l1_loss"]), rel=1e-4)
    agree(theirs.loss, sae, learner, ["W_enc", "b_gate", "b_mag", "r_mag"])
    gate = ((x() - sae.b_dec) @ sae.W_enc + sae.b_gate).relu()
    frozen = (gate @ sae.W_dec.detach() + sae.b_dec.detach() - x()).square().sum(1).mean()
    torch.testing.assert_close(frozen, theirs.losses["auxiliary_reconstruction_loss"])
    agree(theirs.losses["mse_loss"] + theirs.losses["l1_loss"] + frozen, sae, learner)
    with pytest.raises(AssertionError, match="W_dec"):
        agree(theirs.loss, sae, learner, ["W_dec"])


@pytest.mark.parametrize("n_dead", [0, 1, D_MODEL // 2 + 1, 60])
def test_top_k(n_dead: int) -> None:
    """AuxK of SAELens is not divided by what the living left over, and lets negative pre-activations through.

    Its coefficient makes good for the former; dead features that are all positive have none of the latter.
    """
    coefficient, dead = 0.7, torch.arange(D_SAE) < n_dead
    sae = saelens("TopK", k=K)
    with torch.no_grad():
        sae.b_enc[dead] += 20
    residual = (x() - their_step(sae).sae_out).detach()
    spread = (residual - residual.mean(0)).square().sum() / N
    sae.cfg.aux_loss_coefficient = coefficient * VARIANCE / float(spread)
    theirs = their_step(sae, dead)
    ours, learner = our_step(TopK(K, coefficient, VARIANCE), sae, dead)
    assert ours.n_active == K * N == int((theirs.feature_acts > 0).sum())
    assert ours.squared_error / N == pytest.approx(float(theirs.losses["mse_loss"]), rel=1e-4)
    expected = float(theirs.losses["auxiliary_reconstruction_loss"])
    assert ours.aux * coefficient * VARIANCE == pytest.approx(expected, rel=1e-4)
    assert bool(expected) == bool(n_dead)
    agree(theirs.loss, sae, learner)


@pytest.mark.parametrize("k", [K, D_SAE // 2])
def test_jump_relu(k: int) -> None:
    """Our penalty is of the batch's mean L0; SAELens's `quadratic` is of each token's, so its `step` is compared.

    (L0 / k - 1)^2 has the gradient of L0 with the coefficient 2 (L0 / k - 1) / k.
    """
    sae = saelens("JumpReLU", jumprelu_bandwidth=BANDWIDTH)
    l0 = float((their_step(sae, l0=0.0).feature_acts > 0).float().sum(1).mean())
    theirs = their_step(sae, l0=VARIANCE * 2 * (l0 / k - 1) / k)
    ours, learner = our_step(JumpReLU(k, 0.0, VARIANCE), sae)
    assert ours.n_active / N == pytest.approx(l0)
    assert ours.squared_error / N == pytest.approx(float(theirs.losses["mse_loss"]), rel=1e-4)
    agree(theirs.loss, sae, learner)


def test_jump_relu_tanh(monkeypatch: pytest.MonkeyPatch) -> None:
    """SAELens spares the living the pre-activation loss, so all are called dead; it is too small to see by default."""
    monkeypatch.setattr("sae_core.dictionary.jump_relu_tanh.PRE_ACT", 0.1)
    sae = saelens(
        "JumpReLU", jumprelu_bandwidth=2.0, jumprelu_sparsity_loss_mode="tanh", jumprelu_ste_to_input=True,
        pre_act_loss_coefficient=0.1,
    )  # fmt: skip
    theirs = their_step(sae, ~NO_DEAD, l0=COEFFICIENT)
    ours, learner = our_step(JumpReLUTanh(COEFFICIENT, VARIANCE), sae)
    assert ours.squared_error / N == pytest.approx(float(theirs.losses["mse_loss"]), rel=1e-4)
    assert ours.aux * COEFFICIENT == pytest.approx(float(theirs.losses["l0_loss"]), rel=1e-4)
    agree(theirs.loss, sae, learner)
