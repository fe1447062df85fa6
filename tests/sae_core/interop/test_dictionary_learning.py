"""dictionary_learning folders written by hand, against its forward rules stated once more."""

import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sae_core.interop import InteropError, dictionary_learning

D_MODEL, D_SAE, K = 24, 80, 7
OURS = {
    "AutoEncoder": "relu", "AutoEncoderNew": "relu", "AutoEncoderTopK": "top_k", "BatchTopKSAE": "batch_top_k",
    "MatryoshkaBatchTopKSAE": "matryoshka_batch_top_k", "JumpReluAutoEncoder": "jump_relu",
    "GatedAutoEncoder": "gated",
}  # fmt: skip


def config(of: str, /, **changes: Any) -> dict[str, Any]:
    k = {"k": K} if "TopK" in of else {}
    trainer = {"dict_class": of, "activation_dim": D_MODEL, "dict_size": D_SAE, **k, **changes}
    return {"trainer": {key: value for key, value in trainer.items() if value is not None}, "buffer": {"ctx_len": 128}}


def state(dict_class: str, w: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a class: linear layers hold their weights with the output first."""
    linear = {"encoder.weight": w["W_enc"].T, "encoder.bias": w["b_enc"], "decoder.weight": w["W_dec"].T}
    plain = {name: w[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    one = {"k": torch.tensor(K, dtype=torch.int32), "threshold": torch.tensor(0.5)}
    return {
        "AutoEncoder": linear | {"bias": w["b_dec"]},
        "AutoEncoderNew": linear | {"decoder.bias": w["b_dec"]},
        "AutoEncoderTopK": linear | {"b_dec": w["b_dec"], **one},
        "BatchTopKSAE": linear | {"b_dec": w["b_dec"], **one},
        "MatryoshkaBatchTopKSAE": plain | one | {"group_sizes": torch.tensor([20, 60])},
        "JumpReluAutoEncoder": plain | {"threshold": w["threshold"]},
        "GatedAutoEncoder": {
            "encoder.weight": w["W_enc"].T, "decoder.weight": w["W_dec"].T, "decoder_bias": w["b_dec"],
            "gate_bias": w["b_gate"], "mag_bias": w["b_mag"], "r_mag": w["r_mag"],
        },
    }[dict_class]  # fmt: skip


def oracle(dict_class: str, w: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Feature activations, in units of unit decoder rows, and the reconstruction."""
    if dict_class not in ("AutoEncoderNew", "JumpReluAutoEncoder"):
        x = x - w["b_dec"]
    p = x @ w["W_enc"] + w["b_enc"]
    acts = p.relu()
    if dict_class == "AutoEncoderTopK":
        top = acts.topk(K, dim=-1)
        acts = torch.zeros_like(p).scatter(-1, top.indices, top.values)
    if "BatchTopK" in dict_class:
        acts = acts * (acts > 0.5)
    if dict_class == "JumpReluAutoEncoder":
        acts = (p * (p > w["threshold"])).relu()
    if dict_class == "GatedAutoEncoder":
        p = x @ w["W_enc"]
        acts = (p + w["b_gate"] > 0) * (w["r_mag"].exp() * p + w["b_mag"]).relu()
    return acts * w["W_dec"].norm(dim=1), acts @ w["W_dec"] + w["b_dec"]


@pytest.fixture
def make(folder: Callable[..., Path]) -> Callable[..., Path]:
    return partial(folder, weights="ae.pt")


@pytest.mark.parametrize("dict_class", OURS)
def test_what_is_read_encodes_and_decodes_as_the_library_does(
    dict_class: str, make: Callable[..., Path], weights: dict[str, Tensor], x: Tensor
) -> None:
    dictionary = dictionary_learning.read(make(config(dict_class), state(dict_class, weights)))
    acts, x_hat = oracle(dict_class, weights, x)
    assert 0 < (acts > 0).sum() < acts.numel()
    torch.testing.assert_close(dictionary.encode(x), acts, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dictionary.decode(dictionary.encode_sparse(x)), x_hat, rtol=1e-5, atol=1e-5)
    assert dictionary.config["architecture"] == OURS[dict_class]
    assert dictionary.config.get("k") == (K if "TopK" in dict_class else None)


def test_a_topk_needs_no_threshold(make: Callable[..., Path], weights: dict[str, Tensor]) -> None:
    unset = state("AutoEncoderTopK", weights) | {"threshold": torch.tensor(-1.0)}
    dictionary = dictionary_learning.read(make(config("AutoEncoderTopK"), unset))
    assert not dictionary.threshold.any()


def test_a_batch_topk_whose_threshold_was_never_set_is_no_relu(
    make: Callable[..., Path], weights: dict[str, Tensor]
) -> None:
    unset = state("BatchTopKSAE", weights) | {"threshold": torch.tensor(-1.0)}
    with pytest.raises(InteropError, match=r"the threshold is -1, .* train beyond threshold_start_step"):
        dictionary_learning.read(make(config("BatchTopKSAE"), unset))


@pytest.mark.parametrize(
    ("dict_class", "changes", "why"),
    [
        ("AutoEncoder", {"dict_class": "IdentityDict"}, "'IdentityDict' is none of AutoEncoder, "),
        ("AutoEncoder", {"dict_class": None}, "dict_class = None is none of"),
        ("AutoEncoder", {"dict_class": ["AutoEncoder"]}, "is none of"),
        ("AutoEncoder", {"activation_dim": None}, "lacks activation_dim"),
        ("AutoEncoder", {"dict_class": "AutoEncoderNew"}, "lacks decoder.bias"),
        ("AutoEncoderTopK", {"dict_class": "AutoEncoder"}, "lacks bias"),
        ("AutoEncoderTopK", {"k": None}, "lacks k"),
        ("AutoEncoderTopK", {"k": 8}, "says k = 8, ae.pt holds 7: the two files do not belong together"),
        ("BatchTopKSAE", {"dict_size": 24, "activation_dim": 80}, r"encoder.weight is \(80, 24\), transposed"),
        ("JumpReluAutoEncoder", {"dict_class": "BatchTopKSAE", "k": K}, "lacks decoder.weight, encoder.bias"),
    ],
)
def test_a_config_that_does_not_fit_is_refused_with_the_reason(
    dict_class: str, changes: dict[str, Any], why: str, make: Callable[..., Path], weights: dict[str, Tensor]
) -> None:
    with pytest.raises(InteropError, match=why):
        dictionary_learning.read(make(config(dict_class, **changes), state(dict_class, weights)))


def test_weights_without_their_k_are_refused(make: Callable[..., Path], weights: dict[str, Tensor]) -> None:
    tensors = state("AutoEncoderTopK", weights)
    del tensors["k"]
    with pytest.raises(InteropError, match=r"ae.pt holds none"):
        dictionary_learning.read(make(config("AutoEncoderTopK"), tensors))


class Bomb:
    def __reduce__(self) -> tuple[Any, ...]:
        return (Path("/nonexistent/exploded").touch, ())


@pytest.mark.parametrize(
    ("content", "why"),
    [
        (pickle.dumps(Bomb(), 2), "cannot be read"),
        (pickle.dumps({"encoder.weight": [1.0]}, 2), "cannot be read|holds no table of tensors"),
        (b"", "cannot be read"),
        (b"nonsense", "cannot be read"),
    ],
)
def test_a_file_that_is_more_or_less_than_weights_is_refused(
    content: bytes, why: str, make: Callable[..., Path], weights: dict[str, Tensor]
) -> None:
    path = make(config("AutoEncoder"), state("AutoEncoder", weights))
    (path / "ae.pt").write_bytes(content)
    with pytest.raises(InteropError, match=why):
        dictionary_learning.read(path)


def test_the_backup_of_a_run_is_refused_by_what_it_holds(make: Callable[..., Path], weights: dict[str, Tensor]) -> None:
    """`backup_steps` overwrites ae.pt with a checkpoint, which the library itself cannot read either."""
    path = make(config("AutoEncoder"), state("AutoEncoder", weights))
    torch.save({"step": 5, "ae": state("AutoEncoder", weights), "optimizer": {}}, path / "ae.pt")
    with pytest.raises(InteropError, match=r"no table of tensors \(step, ae, optimizer\): give a finished"):
        dictionary_learning.read(path)


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes, bytes]:
    """A folder to damage, and the bytes of a good file in both of torch's formats."""
    import json

    folder = tmp_path_factory.mktemp("damaged")
    (folder / "config.json").write_text(json.dumps(config("AutoEncoder")))
    rng = torch.Generator().manual_seed(0)
    names = ("W_enc", "b_enc", "W_dec", "b_dec")
    shapes = ((D_MODEL, D_SAE), (D_SAE,), (D_SAE, D_MODEL), (D_MODEL,))
    tensors = state("AutoEncoder", {
        **dict.fromkeys(("threshold", "b_gate", "b_mag", "r_mag"), torch.zeros(D_SAE)),
        **{name: torch.randn(*shape, generator=rng) for name, shape in zip(names, shapes, strict=True)},
    })  # fmt: skip
    files = []
    for new in (True, False):
        torch.save(tensors, folder / "ae.pt", _use_new_zipfile_serialization=new)
        files.append((folder / "ae.pt").read_bytes())
    return folder, *files


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@settings(max_examples=150, deadline=None)
@given(place=st.integers(0, 10**6), byte=st.integers(0, 255), new=st.booleans(), cut=st.booleans())
def test_damage_is_refused_or_harmless_but_never_a_traceback(
    damaged: tuple[Path, bytes, bytes], place: int, byte: int, new: bool, cut: bool
) -> None:
    content = bytearray(damaged[1 if new else 2])
    place %= min(len(content), 1500)  # where the structure is; behind it lie the numbers
    content[place] = byte
    (damaged[0] / "ae.pt").write_bytes(content[:place] if cut else content)
    try:
        dictionary = dictionary_learning.read(damaged[0])
    except InteropError:
        return
    assert (dictionary.d_model, dictionary.d_sae) == (D_MODEL, D_SAE)
    assert not cut
