"""Passes of the model over a part: batches of any size, on any device, say the same."""

from pathlib import Path

import pytest
import torch

from sae_core.activations import passes
from sae_core.activations.passes import Part, load_model, parts_of, run_model
from sae_core.study import ActivationSettings, ModelSettings


@pytest.fixture(scope="module")
def part(corpus: Path, site: ActivationSettings) -> Part:
    return next(parts_of(site, "train", corpus))


def check(part: Part, site: ActivationSettings, model: ModelSettings, device: str) -> None:
    """Batch by batch against one pass over all, both in the order of blocks and offsets."""
    lm, real = load_model([site], model, device), part.documents >= 0
    ((shard, norms),) = run_model([site], lm, part)
    (whole,) = lm.capture_many([(site.hook, site.layer)], part.token_ids, part.documents)
    expected = whole.cpu()[real][torch.argsort(part.blocks[real.nonzero()[:, 0]], stable=True)]
    order = torch.argsort(shard.block.long() * real.shape[1] + shard.offset)
    torch.testing.assert_close(shard.acts[order], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(norms[order], expected.norm(dim=1))


@pytest.mark.parametrize("tokens", [1, 100, 1 << 20])
def test_batches_of_any_size_hold_what_one_pass_over_all_holds(
    part: Part, site: ActivationSettings, model: ModelSettings, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(passes.BATCH_TOKENS, "cpu", tokens)
    check(part, site, model, "cpu")


@pytest.mark.gpu
def test_what_is_copied_beside_the_computing_is_what_was_computed(
    part: Part, site: ActivationSettings, model: ModelSettings, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("NOT RUN on a GPU: copies beside the computing; there is no CUDA device here")
    monkeypatch.setitem(passes.BATCH_TOKENS, "cuda", 64)
    check(part, site, model, "cuda")
