"""A corpus of random tokens, the tiny model, and what its harvest wrote."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from sae_core.activations import harvest
from sae_core.study import ActivationSettings, ModelSettings

LENGTH = 32
N_TRAIN, N_HELD_OUT = 1590, 70


def _write_blocks(folder: Path, split: str, n_tokens: int, vocab: int = 512) -> None:
    """Random tokens in documents of 1 to 50 tokens, the last block padded."""
    rng = np.random.default_rng(n_tokens)
    lengths = rng.integers(1, 50, n_tokens)
    columns = {
        "token_ids": rng.integers(3, vocab, n_tokens),
        "documents": np.repeat(np.arange(n_tokens), lengths)[:n_tokens],
        "positions": np.concatenate([np.empty(0), *map(np.arange, lengths)])[:n_tokens],
    }
    padding = {"token_ids": 0, "documents": -1, "positions": 0}
    n_blocks = -(-n_tokens // LENGTH)
    for name, column in columns.items():
        full = np.full(n_blocks * LENGTH, padding[name], np.int32)
        full[:n_tokens] = column
        columns[name] = full.reshape(n_blocks, LENGTH)
    save_file(columns, folder / f"{split}.safetensors")


@pytest.fixture(scope="session")
def write_blocks() -> Callable[..., None]:
    return _write_blocks


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    _write_blocks(folder, "train", N_TRAIN)
    _write_blocks(folder, "held_out", N_HELD_OUT)
    return folder


@pytest.fixture(scope="session")
def model(tiny_model: Path) -> ModelSettings:
    return ModelSettings(source=str(tiny_model))


@pytest.fixture(scope="session")
def site() -> ActivationSettings:
    return ActivationSettings(layer=1, precision="float32", shard_tokens=256)


@pytest.fixture(scope="session")
def made(
    site: ActivationSettings, model: ModelSettings, corpus: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    folder = tmp_path_factory.mktemp("activations")
    harvest(site, model, corpus, folder)
    return folder


@pytest.fixture(scope="session")
def contents() -> Callable[[Path], dict[str, bytes]]:
    """Every file of a folder, but what safetensors leaves of a write that was killed: the store takes that away."""

    def read(folder: Path) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted(folder.glob("[!.]*")) if path.is_file()}

    return read


@pytest.fixture(autouse=True)
def one_thread() -> None:
    """The model is tiny, and threads would only wait for one another."""
    torch.set_num_threads(1)
