"""A small corpus, activations and dictionary, written by hand in the formats that the stages read."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import save_file

from sae_core.dictionary import Dictionary
from sae_core.study import ModelSettings

D_MODEL, D_SAE, LENGTH, N_BLOCKS, N_SHARDS = 32, 24, 48, 30, 3


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> SimpleNamespace:
    """Folders of hand-made artifacts. Some documents repeat, some tokens are sinks, feature 5 is dead."""
    root = tmp_path_factory.mktemp("world")
    folders = {name: root / name for name in ("corpus", "activations", "dictionary")}
    for folder in folders.values():
        folder.mkdir()
    rng = np.random.default_rng(0)
    train = _write_blocks(folders["corpus"], rng)
    dictionary = _write_dictionary(folders["dictionary"])
    for split in ("train", "held_out"):
        _write_activations(folders["activations"], split, train, dictionary, rng)
    return SimpleNamespace(root=root, model=ModelSettings(source=str(tiny_model)), **folders)


def _write_blocks(folder: Path, rng: np.random.Generator) -> dict[str, torch.Tensor]:
    """Documents of 1 to 60 tokens one after another; every fourth is a copy of one boilerplate text."""
    boilerplate = rng.integers(3, 500, 40)
    pieces: list[tuple[int, np.ndarray]] = []
    total = N_BLOCKS * LENGTH - 7
    while sum(len(piece) for _, piece in pieces) < total:
        number = len(pieces)
        pieces.append((number, boilerplate if number % 4 == 0 else rng.integers(3, 500, rng.integers(1, 60))))
    ids = np.concatenate([piece for _, piece in pieces])[:total]
    documents = np.concatenate([np.full(len(piece), number) for number, piece in pieces])[:total]
    positions = np.concatenate([np.arange(len(piece)) for _, piece in pieces])[:total]
    arrays = {
        name: torch.from_numpy(np.pad(a, (0, 7), constant_values=fill).reshape(N_BLOCKS, LENGTH).astype(np.int32))
        for name, a, fill in (("token_ids", ids, 0), ("documents", documents, -1), ("positions", positions, 0))
    }
    for split in ("train", "held_out"):
        save_file(arrays, folder / f"{split}.safetensors")
    n = len(pieces)
    empty = pa.array([""] * n)
    columns = {
        "document": pa.array(range(n), pa.int32()), "source": empty, "title": empty, "language": empty, "kind": empty,
        "license": empty, "split": pa.array(["train"] * n), "text": empty,
        "n_tokens": pa.array([len(piece) for _, piece in pieces], pa.int32()),
    }  # fmt: skip
    pq.write_table(pa.table(columns), folder / "documents.parquet")
    (folder / "skipped.json").write_text("[]")
    return arrays


def _write_dictionary(folder: Path) -> Dictionary:
    generator = torch.Generator().manual_seed(0)
    W_dec = torch.nn.functional.normalize(torch.randn(D_SAE, D_MODEL, generator=generator), dim=1)
    threshold = torch.full((D_SAE,), 0.3)
    threshold[5] = 1e6
    dictionary = Dictionary(
        W_dec.T.contiguous(), torch.zeros(D_SAE), W_dec, torch.zeros(D_MODEL), threshold,
        {"architecture": "batch_top_k", "k": 4},
    )  # fmt: skip
    dictionary.save(folder)
    return dictionary


def _write_activations(
    folder: Path, split: str, blocks: dict[str, torch.Tensor], dictionary: Dictionary, rng: np.random.Generator
) -> None:
    """Each token's activation hangs on its id (so copies fire alike), with noise outside of the boilerplate."""
    by_token = torch.from_numpy(rng.standard_normal((512, D_MODEL), np.float32))
    for index, shard in enumerate(np.array_split(rng.permutation(N_BLOCKS), N_SHARDS)):
        block, offset = (a.ravel() for a in np.meshgrid(shard, np.arange(LENGTH), indexing="ij"))
        order = rng.permutation(len(block))
        block, offset = block[order], offset[order]
        inside = blocks["documents"][block, offset].numpy() >= 0
        block, offset = block[inside], offset[inside]
        documents, token = blocks["documents"][block, offset], blocks["token_ids"][block, offset]
        noise = torch.from_numpy(rng.standard_normal((len(block), D_MODEL), np.float32))
        acts = by_token[token.long()] + noise * (documents % 4 != 0)[:, None]
        is_sink = torch.from_numpy(rng.random(len(block)) < 0.03)
        acts[is_sink] *= 100
        arrays = {
            "acts": acts, "block": torch.from_numpy(block.astype(np.int32)), "token": token.contiguous(),
            "offset": torch.from_numpy(offset.astype(np.int32)), "is_sink": is_sink,
            "kept_sum": acts[~is_sink].double().sum(0),
            "kept_square_norm": acts[~is_sink].double().square().sum()[None],
            "n_kept": (~is_sink).sum()[None], "median_norm": acts.norm(dim=1).median()[None],
        }  # fmt: skip
        save_file(arrays, folder / f"{split}-{index:05d}.safetensors")
    save_file(
        {"mean": torch.zeros(D_MODEL), "mean_square_norm": torch.full((1,), 2.0 * D_MODEL)},
        folder / "statistics.safetensors",
    )
