"""A transcoder against autograd, a planted map from one site to another, and its own training."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from sae_core.dictionary import Dictionary
from sae_core.dictionary.trainer import Training, TrainingError
from sae_core.dictionary.transcoder import Transcoder
from sae_core.dictionary.weights import Learner, Weights
from sae_core.study import DictionarySettings

D_MODEL, D_SAE, K, N, VARIANCE = 16, 48, 4, 40, 13.0


class Pairs:
    """Two sites in a tensor, read as `sae_core.activations.Pair` is."""

    def __init__(self, x: torch.Tensor) -> None:
        self.x, self.n_kept, self.d_model = x, len(x), x.shape[2]

    def statistics(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.x.mean(0), self.x.square().sum(2).mean(0)

    def batches(self, batch_tokens: int, n_steps: int, seed: int, start_step: int = 0) -> Iterator[torch.Tensor]:
        for step in range(start_step, n_steps):
            order = torch.randint(self.n_kept, (batch_tokens,), generator=torch.Generator().manual_seed(seed + step))
            yield self.x[order]


def normal(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def planted() -> tuple[Pairs, torch.Tensor, torch.Tensor]:
    """128 features on a token or so in 64; read in some directions and written in others, with offsets and scales."""
    generator = torch.Generator().manual_seed(0)
    read, written = (torch.nn.functional.normalize(normal(128, 64, seed=s), dim=1) for s in (1, 2))
    f = (torch.rand(30_000, 128, generator=generator) < 4 / 128) * (0.5 + torch.rand(30_000, 128, generator=generator))
    return Pairs(torch.stack([3 * f @ read + 0.3, 0.2 * f @ written - 0.1], dim=1)), read, written


def settings(**changes: object) -> DictionarySettings:
    table = {"architecture": "transcoder", "d_sae": 128, "k": 4, "tokens": 400 * 512, "batch_tokens": 512}
    return DictionarySettings.model_validate(table | changes)


@pytest.fixture(scope="module")
def trained(planted: tuple[Pairs, torch.Tensor, torch.Tensor]) -> Training:
    training = Training(settings(), planted[0])
    list(training.run(planted[0]))
    return training


def test_gradients_equal_those_of_autograd(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae_core.dictionary.sparse.encoder_dtype", lambda device: torch.float32)
    weights = Weights.initial(D_SAE, 0.3 * normal(D_MODEL, seed=1), 0)
    weights.b_enc.add_(0.2 * normal(D_SAE, seed=3))
    architecture = Transcoder(K, 0.0, VARIANCE)
    learner = Learner(architecture.start(weights))
    x = normal(N, 2, D_MODEL, seed=5)
    architecture.step(learner, x, torch.zeros(D_SAE, dtype=torch.bool), progress=0.5)
    W_enc, b_enc, W_dec, b_dec = leaves = [t.clone().requires_grad_() for t in learner.weights.tensors()]
    z = x[:, 0] @ W_enc.T + b_enc
    smallest = z.flatten().sort(descending=True).values[K * N - 1]
    f = torch.where((z >= smallest) & (z > 0), z, 0.0)
    loss = (x[:, 1] - f @ W_dec - b_dec).square().sum() / N / VARIANCE
    for ours, theirs in zip(learner.gradients.tensors(), torch.autograd.grad(loss, leaves), strict=True):
        assert theirs.any()
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)


def test_what_is_written_is_found_from_what_is_read(
    planted: tuple[Pairs, torch.Tensor, torch.Tensor], trained: Training
) -> None:
    _, read, written = planted
    dictionary = trained.dictionary()
    cosine, twin = (dictionary.W_dec @ written.T).max(dim=0)
    assert float(cosine.mean()) >= 0.9
    reads = torch.nn.functional.cosine_similarity(dictionary.W_enc.T[twin], read)
    assert float(reads.mean()) >= 0.5  # twice as many as dimensions: an encoder's row leans away from the others
    assert trained.history[-1].fvu < 0.25


def test_the_folded_transcoder_reads_and_writes_raw_activations(
    planted: tuple[Pairs, torch.Tensor, torch.Tensor], trained: Training
) -> None:
    x = planted[0].x[:500]
    dictionary = trained.dictionary()
    out = dictionary.decode(dictionary.encode(x[:, 0]))
    scaled, weights = trained.scaling.apply(x), trained.learner.weights
    z = scaled[:, 0] @ weights.W_enc.T + weights.b_enc
    expected = (z * (z > trained.architecture.thresholds(weights))) @ weights.W_dec + weights.b_dec
    torch.testing.assert_close(out, expected / trained.scaling.scale, rtol=1e-4, atol=1e-5)
    fvu = (out - x[:, 1]).square().sum() / (x[:, 1] - x[:, 1].mean(0)).square().sum()
    assert fvu < 0.25


def test_a_resumed_transcoder_has_the_same_bits_and_is_saved_as_a_dictionary(
    planted: tuple[Pairs, torch.Tensor, torch.Tensor], tmp_path: Path
) -> None:
    short = settings(tokens=12 * 512)
    whole = Training(short, planted[0])
    list(whole.run(planted[0]))
    first = Training(short, planted[0])
    steps = first.run(planted[0])
    for _ in range(5):
        next(steps)
    first.save(tmp_path / "checkpoint")
    second = Training(short, planted[0]).restore(tmp_path / "checkpoint")
    list(second.run(planted[0]))
    whole.dictionary().save(tmp_path)
    loaded = Dictionary.load(tmp_path)
    assert loaded.config["architecture"] == "transcoder"
    for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold"):
        assert torch.equal(getattr(second.dictionary(), name), getattr(loaded, name)), name


def test_only_a_transcoder_is_trained_on_pairs_and_on_nothing_else(
    planted: tuple[Pairs, torch.Tensor, torch.Tensor],
) -> None:
    with pytest.raises(TrainingError, match="a transcoder, and nothing else, is trained on a pair of sites"):
        Training(settings(architecture="top_k"), planted[0])
