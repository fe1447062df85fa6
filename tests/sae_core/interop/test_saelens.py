"""SAELens folders written by hand, against its forward rule stated once more."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sae_core.dictionary import Dictionary
from sae_core.interop import InteropError, saelens

D_MODEL, D_SAE, K = 24, 80, 7
STANDARD = ("W_enc", "b_enc", "W_dec", "b_dec")
NAMES = {
    "standard": STANDARD, "topk": STANDARD, "jumprelu": (*STANDARD, "threshold"),
    "gated": ("W_enc", "W_dec", "b_dec", "b_gate", "b_mag", "r_mag"),
}  # fmt: skip
OURS = {"standard": "relu", "topk": "top_k", "jumprelu": "jump_relu", "gated": "gated"}


def config(of: str, /, **changes: Any) -> dict[str, Any]:
    """A cfg.json as SAELens 6 writes it; what is changed to None is left out."""
    own = {"k": K, "rescale_acts_by_decoder_norm": False} if of == "topk" else {}
    whole = {
        "architecture": of, "d_in": D_MODEL, "d_sae": D_SAE, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": True, "normalize_activations": "none", "reshape_activations": "none", **own,
        "metadata": {"sae_lens_version": "6.54.12", "hook_name": "blocks.3.hook_resid_post"},
    }  # fmt: skip
    return {key: value for key, value in (whole | changes).items() if value is not None}


@pytest.fixture
def make(folder: Callable[..., Path]) -> Callable[..., Path]:
    return partial(folder, weights="sae_weights.safetensors")


def oracle(cfg: dict[str, Any], w: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """Feature activations, in units of unit decoder rows, and the reconstruction."""
    norms = w["W_dec"].norm(dim=1)
    x = x - w["b_dec"] if cfg.get("apply_b_dec_to_input", True) else x
    scaled = bool(cfg.get("rescale_acts_by_decoder_norm"))
    if cfg["architecture"] == "gated":
        acts = (x @ w["W_enc"] + w["b_gate"] > 0) * (x @ (w["W_enc"] * w["r_mag"].exp()) + w["b_mag"]).relu()
    else:
        p = x @ w["W_enc"] + w["b_enc"]
        p = p * norms if scaled else p
        acts = p.relu()
        if cfg["architecture"] == "jumprelu":
            acts = acts * (p > w["threshold"])
        if cfg["architecture"] == "topk":
            top = p.topk(cfg["k"], dim=-1)
            acts = torch.zeros_like(p).scatter(-1, top.indices, top.values.relu())
    if scaled:
        return acts, acts / norms @ w["W_dec"] + w["b_dec"]
    return acts * norms, acts @ w["W_dec"] + w["b_dec"]


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("architecture", NAMES)
def test_what_is_read_encodes_and_decodes_as_the_library_does(
    architecture: str, centered: bool, make: Callable[..., Path], weights: dict[str, Tensor], x: Tensor
) -> None:
    cfg = config(architecture, apply_b_dec_to_input=centered)
    dictionary = saelens.read(make(cfg, {name: weights[name] for name in NAMES[architecture]}))
    acts, x_hat = oracle(cfg, weights, x)
    assert 0 < (acts > 0).sum() < acts.numel()
    torch.testing.assert_close(dictionary.encode(x), acts, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dictionary.decode(dictionary.encode_sparse(x)), x_hat, rtol=1e-5, atol=1e-5)
    assert dictionary.config["architecture"] == OURS[architecture]
    assert dictionary.config.get("k") == (K if architecture == "topk" else None)


def test_an_imported_gated_dictionary_is_saved_and_loaded(
    make: Callable[..., Path], weights: dict[str, Tensor], x: Tensor, tmp_path: Path
) -> None:
    details = {"training_architecture_details": {"l1_coefficient": 2}}
    cfg = config("gated", metadata={"sae_lens_version": "6.54.12", "training_architecture": "gated", **details})
    read = saelens.read(make(cfg, {name: weights[name] for name in NAMES["gated"]}))
    read.save(tmp_path)
    loaded = Dictionary.load(tmp_path)
    assert loaded.config == read.config
    assert (loaded.config["architecture"], loaded.config["l1_coefficient"]) == ("gated", 2)
    torch.testing.assert_close(loaded.encode(x), oracle(cfg, weights, x)[0], rtol=1e-5, atol=1e-5)


def test_a_topk_ranked_after_scaling_by_decoder_norms_differs_and_is_read_as_such(
    make: Callable[..., Path], weights: dict[str, Tensor], x: Tensor
) -> None:
    cfg = config("topk", rescale_acts_by_decoder_norm=True)
    dictionary = saelens.read(make(cfg, {name: weights[name] for name in STANDARD}))
    acts, x_hat = oracle(cfg, weights, x)
    torch.testing.assert_close(dictionary.encode(x), acts, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(dictionary.decode(dictionary.encode(x)), x_hat, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(acts, oracle(config("topk"), weights, x)[0], atol=1e-3)


def test_an_old_config_without_a_version_is_read_with_its_defaults(
    make: Callable[..., Path], weights: dict[str, Tensor], x: Tensor
) -> None:
    old = {"d_in": D_MODEL, "d_sae": D_SAE, "dtype": "torch.float32", "hook_point": "blocks.3.hook_resid_pre"}
    tensors = {name: weights[name] for name in STANDARD} | {"scaling_factor": torch.ones(D_SAE)}
    dictionary = saelens.read(make(old, tensors))
    torch.testing.assert_close(dictionary.encode(x), oracle(config("standard"), weights, x)[0], rtol=1e-5, atol=1e-5)


def test_an_old_topk_that_calls_itself_standard_is_no_relu(
    make: Callable[..., Path], weights: dict[str, Tensor], x: Tensor
) -> None:
    """https://github.com/jbloomAus/SAELens/issues/553: L0 600 in place of 80, and no error."""
    old = config("standard", activation_fn_str="topk", activation_fn_kwargs={"k": K}, metadata=None)
    dictionary = saelens.read(make(old, {name: weights[name] for name in STANDARD}))
    assert int((dictionary.encode(x) > 0).sum(1).max()) == K
    torch.testing.assert_close(dictionary.encode(x), oracle(config("topk"), weights, x)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("trained", "details", "expected"),
    [
        ("batchtopk", {"k": 32.0}, {"architecture": "batch_top_k", "k": 32}),
        ("batchtopk", {"k": 32.5}, {"architecture": "batch_top_k"}),
        ("matryoshka_batchtopk", {"k": 5}, {"architecture": "matryoshka_batch_top_k", "k": 5}),
        (
            "jumprelu",
            {"jumprelu_sparsity_loss_mode": "tanh", "l0_coefficient": 4.0},
            {"architecture": "jump_relu_tanh", "l1_coefficient": 4.0},
        ),
        ("jumprelu", {"jumprelu_sparsity_loss_mode": "step", "l0_coefficient": 4.0}, {"architecture": "jump_relu"}),
        ("something_new", {}, {"architecture": "jump_relu"}),
    ],
)
def test_a_jumprelu_says_what_it_was_trained_as(
    trained: str, details: dict[str, Any], expected: dict[str, Any],
    make: Callable[..., Path], weights: dict[str, Tensor],
) -> None:  # fmt: skip
    said = {"sae_lens_version": "6.5.0", "training_architecture": trained, "training_architecture_details": details}
    dictionary = saelens.read(make(config("jumprelu", metadata=said), {n: weights[n] for n in NAMES["jumprelu"]}))
    said = {key: dictionary.config[key] for key in ("architecture", "k", "l1_coefficient") if key in dictionary.config}
    assert said == expected


def test_sixteen_bits_become_float32_and_the_config_says_so(
    make: Callable[..., Path], weights: dict[str, Tensor], x: Tensor
) -> None:
    half = {name: weights[name].bfloat16() for name in NAMES["jumprelu"]}
    dictionary = saelens.read(make(config("jumprelu", dtype="bfloat16"), half))
    whole = {name: tensor.float() for name, tensor in half.items()}
    torch.testing.assert_close(dictionary.encode(x), oracle(config("jumprelu"), whole, x)[0], rtol=1e-5, atol=1e-5)
    assert dictionary.config["imported"] == {
        "format": "saelens", "dtype": "bfloat16", "hook_name": "blocks.3.hook_resid_post",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"architecture": "temporal"}, "'temporal' is none of standard, topk, jumprelu, gated$"),
        ({"architecture": "batchtopk"}, "a training checkpoint; save it for inference first"),
        ({"architecture": ["standard"]}, "is none of"),
        ({"activation_fn_str": "tanh-relu"}, "'tanh-relu' is neither relu nor topk"),
        ({"normalize_activations": "layer_norm"}, "'layer_norm' needs more than the weights"),
        ({"normalize_activations": "constant_norm_rescale"}, "'constant_norm_rescale' needs more"),
        ({"normalize_activations": "expected_average_only_in"}, "fold it with SAELens and save again"),
        ({"reshape_activations": "hook_z"}, "no site here is"),
        ({"architecture": "topk"}, "lacks k"),
        ({"architecture": "topk", "k": 0}, "k = 0: expected a whole number of at least 1"),
        ({"architecture": "topk", "k": D_SAE + 1}, "k = 81, more than its 80 features"),
        ({"architecture": "topk", "k": "seven"}, "k = 'seven'"),
        ({"d_sae": None}, "lacks d_sae"),
        ({"d_sae": 79}, r"W_enc is \(24, 80\); the config wants \(24, 79\)"),
        ({"metadata": [1]}, "metadata"),
        ({"architecture": "jumprelu"}, "lacks threshold"),
    ],
)
def test_a_config_that_cannot_be_held_is_refused_with_the_reason(
    changes: dict[str, Any], why: str, make: Callable[..., Path], weights: dict[str, Tensor]
) -> None:
    path = make(config("standard", **changes), {name: weights[name] for name in STANDARD})
    with pytest.raises(InteropError, match=why):
        saelens.read(path)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda t: t.pop("b_dec"), "lacks b_dec: expected W_dec, W_enc, b_dec, b_enc"),
        (lambda t: t.update(threshold=torch.ones(D_SAE)), "holds a foreign threshold"),
        (lambda t: t.update(scaling_factor=torch.full((D_SAE,), 2.0)), "holds a foreign scaling_factor"),
        (lambda t: t.update(W_dec=t["W_dec"].T), r"W_dec is \(24, 80\), transposed; the config wants \(80, 24\)"),
        (lambda t: t.update(b_enc=t["b_enc"].int()), "b_enc is torch.int32"),
        (lambda t: t["b_enc"].fill_(torch.nan), "b_enc holds NaN"),
        (lambda t: t["W_dec"][5].zero_(), "feature 5 has a decoder row of zeros"),
        (lambda t: (t["W_dec"].mul_(1e30), t["b_enc"].mul_(1e30)), "b_enc becomes too large for float32"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_with_the_reason(
    change: Callable[[dict[str, Tensor]], object], why: str, make: Callable[..., Path], weights: dict[str, Tensor]
) -> None:
    tensors = {name: weights[name] for name in STANDARD}
    change(tensors)
    with pytest.raises(InteropError, match=why):
        saelens.read(make(config("standard"), tensors))


def test_a_row_of_zeros_is_refused_where_norms_scale_the_ranks(
    make: Callable[..., Path], weights: dict[str, Tensor]
) -> None:
    weights["W_dec"][5] = 0
    cfg = config("topk", rescale_acts_by_decoder_norm=True)
    with pytest.raises(InteropError, match="feature 5 has a decoder row of zeros"):
        saelens.read(make(cfg, {name: weights[name] for name in STANDARD}))


def test_files_are_as_the_library_wants_them(
    make: Callable[..., Path], weights: dict[str, Tensor], tmp_path: Path
) -> None:
    dictionary = saelens.read(make(config("jumprelu"), {name: weights[name] for name in NAMES["jumprelu"]}))
    (tmp_path / "out").mkdir()
    saelens.write(dictionary, tmp_path / "out")
    cfg = json.loads((tmp_path / "out" / "cfg.json").read_text())
    assert {"architecture", "d_in", "d_sae", "dtype"} <= cfg.keys()
    assert cfg["metadata"]["sae_lens_version"] >= "6.0.0"
    tensors = load_file(tmp_path / "out" / "sae_weights.safetensors")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    assert shapes == {
        "W_enc": (D_MODEL, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, D_MODEL), "b_dec": (D_MODEL,),
        "threshold": (D_SAE,),
    }  # fmt: skip
