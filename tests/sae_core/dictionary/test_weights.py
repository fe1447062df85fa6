"""One step of Adam against PyTorch's own, and the decoder's constraint."""

import pytest
import torch

from sae_core.dictionary.weights import MAX_NORM, Learner, Weights

D_MODEL, D_SAE = 6, 10


def gradients(seed: int, size: float) -> Weights:
    generator = torch.Generator().manual_seed(seed)
    like = Weights.initial(D_SAE, torch.zeros(D_MODEL), 0)
    return Weights(*(torch.randn(t.shape, generator=generator) * size for t in like.tensors()))


def update(learner: Learner, gradient: Weights, step: int, lr: float) -> float:
    for own, given in zip(learner.gradients.tensors(), gradient.tensors(), strict=True):
        own.copy_(given)
    return learner.update(step, lr)


def test_encoder_starts_as_the_decoder_with_unit_rows() -> None:
    weights = Weights.initial(D_SAE, torch.arange(6.0), seed=3)
    assert torch.equal(weights.W_enc, weights.W_dec)
    torch.testing.assert_close(weights.W_dec.norm(dim=1), torch.ones(D_SAE))
    assert torch.equal(weights.b_dec, torch.arange(6.0))
    assert not weights.b_enc.any()
    assert not torch.equal(weights.W_dec, Weights.initial(D_SAE, torch.arange(6.0), seed=4).W_dec)


def test_steps_equal_those_of_clipped_adam_with_the_constraint() -> None:
    learner = Learner(Weights.initial(D_SAE, torch.zeros(D_MODEL), 0))
    reference = [tensor.clone().requires_grad_() for tensor in learner.weights.tensors()]
    adam = torch.optim.Adam(reference, lr=0.01)
    for step, size in enumerate((0.001, 5.0, 0.01)):  # the middle one is clipped
        gradient = gradients(step, size)
        for parameter, g in zip(reference, gradient.tensors(), strict=True):
            parameter.grad = g.clone()
        W_dec = reference[2]
        assert W_dec.grad is not None
        W_dec.grad -= (W_dec.grad * W_dec.detach()).sum(1, keepdim=True) * W_dec.detach()
        expected_norm = torch.nn.utils.clip_grad_norm_(reference, MAX_NORM)
        adam.step()
        with torch.no_grad():
            W_dec /= W_dec.norm(dim=1, keepdim=True)
        assert update(learner, gradient, step, lr=0.01) == pytest.approx(float(expected_norm), rel=1e-5)
        for ours, theirs in zip(learner.weights.tensors(), reference, strict=True):
            torch.testing.assert_close(ours, theirs.detach(), rtol=1e-4, atol=1e-6)


def test_low_precision_encoder_follows_the_weights() -> None:
    learner = Learner(Weights.initial(D_SAE, torch.zeros(D_MODEL), 0))
    update(learner, gradients(0, 1.0), 0, lr=0.1)
    assert torch.equal(learner.W_enc_low, learner.weights.W_enc.to(learner.W_enc_low.dtype))


def test_no_gradient_is_no_step() -> None:
    learner = Learner(Weights.initial(D_SAE, torch.zeros(D_MODEL), 0))
    before = [tensor.clone() for tensor in learner.weights.tensors()]
    assert learner.update(0, lr=0.1) == 0
    for now, then in zip(learner.weights.tensors(), before, strict=True):
        torch.testing.assert_close(now, then)


def test_state_gives_the_same_next_step() -> None:
    learner = Learner(Weights.initial(D_SAE, torch.zeros(D_MODEL), 0))
    update(learner, gradients(0, 1.0), 0, lr=0.1)
    again = Learner.from_state({name: tensor.clone() for name, tensor in learner.state().items()})
    for one in (learner, again):
        update(one, gradients(1, 1.0), 1, lr=0.1)
    assert all(torch.equal(a, b) for a, b in zip(learner.weights.tensors(), again.weights.tensors(), strict=True))
    assert torch.equal(learner.W_enc_low, again.W_enc_low)
