"""The tiny model, loaded, and readers of random dictionaries at any of its sites."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sae_core.dictionary import Dictionary
from sae_core.language_model import LanguageModel
from sae_core.names import Hook
from sae_core.prompt_reader import PromptReader
from sae_core.study import ModelSettings

D_MODEL, D_SAE = 32, 64


@pytest.fixture(scope="session")
def lm(tiny_model: Path) -> LanguageModel:
    return LanguageModel.load(ModelSettings(source=str(tiny_model)), precision="float32")


@pytest.fixture(scope="session")
def reader_at() -> Callable[..., PromptReader]:
    """Of a model, at a site, with a random dictionary; `config` is what the dictionary says of itself."""

    def at(lm: LanguageModel, hook: Hook, layer: int, sink_norm: float = 1e9, **config: object) -> PromptReader:
        rng = torch.Generator().manual_seed(0)
        W_enc = torch.randn(D_MODEL, D_SAE, generator=rng)
        W_dec = torch.nn.functional.normalize(torch.randn(D_SAE, D_MODEL, generator=rng), dim=1)
        b_enc, b_dec = torch.full((D_SAE,), -0.2), 0.1 * torch.randn(D_MODEL, generator=rng)
        said = {"architecture": "batch_top_k", **config}
        dictionary = Dictionary(W_enc, b_enc, W_dec, b_dec, torch.full((D_SAE,), 0.1), said)
        return PromptReader(lm, dictionary, hook, layer, 32, sink_norm)

    return at


@pytest.fixture(scope="session")
def reader(lm: LanguageModel, reader_at: Callable[..., PromptReader]) -> PromptReader:
    """In the middle of the residual stream."""
    return reader_at(lm, "resid_post", 2)
