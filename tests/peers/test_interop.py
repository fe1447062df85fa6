"""Our folders in the hands of the other libraries, and theirs in ours; `pip install -e '.[peers]'` brings them.

What cannot run because a library is missing is skipped, and the summary of the tests names the library.
"""

import importlib
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_core import interop
from sae_core.dictionary import Dictionary

pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]
os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")

D_MODEL, D_SAE, K = 32, 128, 8
CLOSE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


def peer(module: str) -> Any:
    """The library, or a skip that says which is missing."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(module)
        except ImportError as error:
            return pytest.skip(f"NOT COMPARED with {module.partition('.')[0]}: {error}")


@pytest.fixture
def x() -> Tensor:
    return 2 * torch.randn(50, D_MODEL, generator=torch.Generator().manual_seed(2)) + 0.5


def ours(kind: str) -> Dictionary:
    """A dictionary of ours: `thresholds`, `relu`, or `ranks` that decoder norms of their own have changed."""
    rng = torch.Generator().manual_seed(3)
    W_dec = torch.nn.functional.normalize(torch.randn(D_SAE, D_MODEL, generator=rng), dim=1)
    threshold = torch.rand(D_SAE, generator=rng) if kind == "thresholds" else torch.zeros(D_SAE)
    architecture = {"thresholds": "batch_top_k", "relu": "relu", "ranks": "top_k"}[kind]
    return Dictionary(
        torch.randn(D_MODEL, D_SAE, generator=rng), torch.randn(D_SAE, generator=rng), W_dec,
        torch.randn(D_MODEL, generator=rng), threshold, {"architecture": architecture, "k": K},
        torch.rand(D_SAE, generator=rng) + 0.5 if kind == "ranks" else None,
    )  # fmt: skip


def randomize(module: Any, scale: float = 0.5) -> None:
    """Every parameter random, so that nothing is right because it is zero or one."""
    torch.manual_seed(4)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape))


def agree(mine: Dictionary, x: Tensor, acts: Tensor, norms: Tensor, x_hat: Tensor) -> None:
    """Their activations, in our units, and their reconstruction are ours."""
    assert 0 < int((acts > 0).sum()) < acts.numel()
    torch.testing.assert_close(mine.encode(x), acts * norms, **CLOSE)
    largest = float(x_hat.abs().max())  # where many rows nearly cancel, what is left has the rounding of all of them
    torch.testing.assert_close(mine.decode(mine.encode_sparse(x)), x_hat, rtol=1e-5, atol=1e-5 * largest)


def ones() -> Tensor:
    return torch.ones(D_SAE)


@pytest.mark.parametrize("kind", ["thresholds", "relu", "ranks"])
def test_saelens_loads_our_export(kind: str, x: Tensor, tmp_path: Path) -> None:
    sae_lens, mine = peer("sae_lens"), ours(kind)
    interop.write(mine, tmp_path, "saelens")
    with torch.no_grad():
        sae = sae_lens.SAE.load_from_disk(str(tmp_path))
        acts, norms = sae.encode(x), sae.W_dec.norm(dim=1)
        assert sae.cfg.architecture() == {"thresholds": "jumprelu", "relu": "standard", "ranks": "topk"}[kind]
        assert sae.cfg.metadata.training_architecture == {"thresholds": "batchtopk", "relu": "standard"}.get(
            kind, "topk"
        )
        agree(mine, x, acts, norms, sae.decode(acts))


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("architecture", ["standard", "topk", "topk rescaled", "jumprelu", "gated"])
def test_we_read_what_saelens_saves(architecture: str, centered: bool, x: Tensor, tmp_path: Path) -> None:
    sae_lens = peer("sae_lens")
    names = {"standard": "Standard", "topk": "TopK", "jumprelu": "JumpReLU", "gated": "Gated"}
    name, _, rescaled = architecture.partition(" ")
    settings: dict[str, Any] = {"d_in": D_MODEL, "d_sae": D_SAE, "apply_b_dec_to_input": centered}
    if name == "topk":
        settings |= {"k": K, "rescale_acts_by_decoder_norm": bool(rescaled)}
    saes = importlib.import_module(f"sae_lens.saes.{name}_sae")
    sae = getattr(saes, f"{names[name]}SAE")(getattr(saes, f"{names[name]}SAEConfig")(**settings))
    assert isinstance(sae, sae_lens.SAE)
    randomize(sae)
    sae.save_model(tmp_path)
    with torch.no_grad():
        acts = sae.encode(x)
        norms = ones() if rescaled else sae.W_dec.norm(dim=1)
        agree(interop.read(tmp_path), x, acts, norms, sae.decode(acts))


@pytest.mark.parametrize(
    ("name", "expected"), [("batchtopk", "batch_top_k"), ("matryoshka_batchtopk", "matryoshka_batch_top_k")]
)
def test_we_read_what_saelens_saves_at_the_end_of_training(name: str, expected: str, x: Tensor, tmp_path: Path) -> None:
    peer("sae_lens")
    saes = importlib.import_module(f"sae_lens.saes.{name}_sae")
    prefix = {"batchtopk": "BatchTopK", "matryoshka_batchtopk": "MatryoshkaBatchTopK"}[name]
    widths = {"matryoshka_widths": [32, D_SAE]} if name.startswith("matryoshka") else {}
    config = getattr(saes, f"{prefix}TrainingSAEConfig")(d_in=D_MODEL, d_sae=D_SAE, k=K, **widths)
    sae = getattr(saes, f"{prefix}TrainingSAE")(config)
    randomize(sae)
    sae.topk_threshold.fill_(0.7)
    sae.save_inference_model(tmp_path)
    read = interop.read(tmp_path)
    assert (read.config["architecture"], read.config["k"]) == (expected, K)
    theirs = peer("sae_lens").SAE.load_from_disk(str(tmp_path))
    with torch.no_grad():
        acts = theirs.encode(x)
        agree(read, x, acts, theirs.W_dec.norm(dim=1), theirs.decode(acts))


@pytest.mark.parametrize("kind", ["thresholds", "relu", "ranks"])
def test_dictionary_learning_loads_our_export(kind: str, x: Tensor, tmp_path: Path) -> None:
    utils, mine = peer("dictionary_learning.utils"), ours(kind)
    interop.write(mine, tmp_path, "dictionary_learning")
    theirs, config = utils.load_dictionary(str(tmp_path), "cpu")
    W_dec = theirs.decoder.weight.T if kind == "ranks" else theirs.W_dec
    assert type(theirs).__name__ == config["trainer"]["dict_class"]
    with torch.no_grad():
        acts = theirs.encode(x)
        agree(mine, x, acts, W_dec.norm(dim=1), theirs.decode(acts))


@pytest.mark.parametrize(
    "name",
    [
        "AutoEncoder", "AutoEncoderNew", "AutoEncoderTopK", "BatchTopKSAE", "MatryoshkaBatchTopKSAE",
        "JumpReluAutoEncoder", "GatedAutoEncoder",
    ],
)  # fmt: skip
def test_we_read_what_dictionary_learning_saves(name: str, x: Tensor, tmp_path: Path) -> None:
    package = peer("dictionary_learning.trainers")
    modules = [peer("dictionary_learning.dictionary"), *vars(package).values()]
    modules += [peer(f"dictionary_learning.trainers.{m}") for m in ("top_k", "batch_top_k", "matryoshka_batch_top_k")]
    kind = next(getattr(module, name) for module in modules if hasattr(module, name))
    k = {"k": K} if "TopK" in name else {}
    groups = {"group_sizes": [32, 96]} if name.startswith("Matryoshka") else {}
    theirs = kind(D_MODEL, D_SAE, **k, **groups)
    randomize(theirs)
    if k:
        theirs.threshold.fill_(0.7)
    torch.save(theirs.state_dict(), tmp_path / "ae.pt")
    trainer = {"dict_class": name, "activation_dim": D_MODEL, "dict_size": D_SAE, **k}
    interop.foreign.write_config(tmp_path / "config.json", {"trainer": trainer, "buffer": {}})
    W_dec = theirs.W_dec if hasattr(theirs, "W_dec") else theirs.decoder.weight.T
    with torch.no_grad():
        acts = theirs.encode(x)
        agree(interop.read(tmp_path), x, acts, W_dec.norm(dim=1), theirs.decode(acts))


def dense(encoded: Any) -> Tensor:
    return torch.zeros(len(encoded.top_acts), D_SAE).scatter(-1, encoded.top_indices, encoded.top_acts)


def test_sparsify_loads_our_export(x: Tensor, tmp_path: Path) -> None:
    coders, mine = peer("sparsify"), ours("ranks")
    interop.write(mine, tmp_path, "sparsify")
    theirs = coders.SparseCoder.load_from_disk(tmp_path)
    with torch.no_grad():
        encoded = theirs.encode(x)
        x_hat = theirs.decode(encoded.top_acts, encoded.top_indices)
        agree(mine, x, dense(encoded), theirs.W_dec.norm(dim=1), x_hat)


def test_we_read_what_sparsify_saves(x: Tensor, tmp_path: Path) -> None:
    coders = peer("sparsify")
    theirs = coders.SparseCoder(D_MODEL, coders.SparseCoderConfig(expansion_factor=4, k=K))
    randomize(theirs)
    theirs.save_to_disk(tmp_path)
    with torch.no_grad():
        encoded = theirs.encode(x)
        x_hat = theirs.decode(encoded.top_acts, encoded.top_indices)
        agree(interop.read(tmp_path), x, dense(encoded), theirs.W_dec.norm(dim=1), x_hat)
