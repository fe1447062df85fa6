"""sparsify folders written by hand, against its forward rule stated once more."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from sae_core.dictionary import Dictionary
from sae_core.interop import InteropError, sparsify

D_MODEL, D_SAE, K = 24, 96, 7


def config(**changes: Any) -> dict[str, Any]:
    whole = {
        "activation": "topk", "expansion_factor": 4, "normalize_decoder": True, "num_latents": 0, "k": K,
        "multi_topk": False, "skip_connection": False, "transcode": False, "d_in": D_MODEL,
    }  # fmt: skip
    return {key: value for key, value in (whole | changes).items() if value is not None}


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    """Decoder rows a little off unit norm, as the last step of a run leaves them."""
    rng = torch.Generator().manual_seed(1)
    W_dec = torch.nn.functional.normalize(torch.randn(D_SAE, D_MODEL, generator=rng), dim=1)
    return {
        "encoder.weight": W_dec + 0.1 * torch.randn(D_SAE, D_MODEL, generator=rng),
        "encoder.bias": torch.randn(D_SAE, generator=rng), "b_dec": torch.randn(D_MODEL, generator=rng),
        "W_dec": W_dec * torch.linspace(0.97, 1.03, D_SAE)[:, None],
    }  # fmt: skip


@pytest.fixture
def make(folder: Callable[..., Path]) -> Callable[..., Path]:
    return partial(folder, weights="sae.safetensors")


@pytest.mark.parametrize("changes", [{}, {"num_latents": D_SAE, "expansion_factor": 9}, {"activation": None}])
def test_what_is_read_encodes_and_decodes_as_the_library_does(
    changes: dict[str, Any], make: Callable[..., Path], tensors: dict[str, Tensor], x: Tensor
) -> None:
    dictionary = sparsify.read(make(config(**changes), tensors))
    p = ((x - tensors["b_dec"]) @ tensors["encoder.weight"].T + tensors["encoder.bias"]).relu()
    top = p.topk(K, dim=-1)
    acts = torch.zeros_like(p).scatter(-1, top.indices, top.values)
    norms = tensors["W_dec"].norm(dim=1)
    torch.testing.assert_close(dictionary.encode(x), acts * norms, rtol=1e-5, atol=1e-5)
    x_hat = acts @ tensors["W_dec"] + tensors["b_dec"]
    torch.testing.assert_close(dictionary.decode(dictionary.encode_sparse(x)), x_hat, rtol=1e-5, atol=1e-5)
    assert (dictionary.config["architecture"], dictionary.config["k"]) == ("top_k", K)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"activation": "groupmax"}, "'groupmax' is not topk"),
        ({"transcode": True}, "transcoder"),
        ({"skip_connection": True}, "linear function of the input"),
        ({"signed": True}, "either sign"),
        ({"k": None}, "lacks k"),
        ({"d_in": None}, "lacks d_in"),
        ({"expansion_factor": None}, "lacks expansion_factor"),
        ({"num_latents": "many"}, "num_latents = 'many'"),
        ({"k": 97}, "k = 97, more than its 96"),
        ({"expansion_factor": 5}, r"encoder.weight is \(96, 24\); the config wants \(120, 24\)"),
    ],
)
def test_a_config_that_cannot_be_held_is_refused_with_the_reason(
    changes: dict[str, Any], why: str, make: Callable[..., Path], tensors: dict[str, Tensor]
) -> None:
    with pytest.raises(InteropError, match=why):
        sparsify.read(make(config(**changes), tensors))


def test_a_coder_without_a_decoder_is_refused(make: Callable[..., Path], tensors: dict[str, Tensor]) -> None:
    del tensors["W_dec"]
    with pytest.raises(InteropError, match="lacks W_dec"):
        sparsify.read(make(config(), tensors))


def test_thresholds_are_not_written_as_ranks(
    make: Callable[..., Path], tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    d = sparsify.read(make(config(), tensors))
    thresholded = Dictionary(d.W_enc, d.b_enc, d.W_dec, d.b_dec, d.threshold + 1, {"architecture": "top_k", "k": K})
    (tmp_path / "out").mkdir()
    with pytest.raises(InteropError, match="fire above thresholds: export it as saelens or dictionary_learning"):
        sparsify.write(thresholded, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())
