"""SAELens: `cfg.json` and `sae_weights.safetensors`, as its version 6 writes and reads them; older configs are read.

What each architecture computes:

    x' = x - b_dec * apply_b_dec_to_input;   p = x' @ W_enc + b_enc
    standard   relu(p)
    jumprelu   relu(p) * (p > threshold): what its BatchTopK and Matryoshka dictionaries are saved as, too
    topk       relu of the k largest p, or with `rescale_acts_by_decoder_norm` of the k largest p * |W_dec|,
               whose decoder rows then count as unit
    gated      (x' @ W_enc + b_gate > 0) * relu(x' @ (W_enc * exp(r_mag)) + b_mag)
"""

from pathlib import Path
from typing import Any

import torch

from sae_core.dictionary import Dictionary
from sae_core.interop.foreign import (
    InteropError,
    active,
    count,
    fold,
    from_gated,
    part,
    precision,
    put,
    read_config,
    read_tensors,
    take,
    thresholded,
    unfold_ranked,
    write_config,
    write_tensors,
)
from sae_core.names import Site
from sae_core.study import PENALIZED

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
FILES = (CONFIG, WEIGHTS)
VERSION = "6.0.0"
"""The first version of SAELens whose files look like ours; without one, it would take them for older ones."""

_ENDS = {"W_dec": ("W_dec", "fd"), "b_dec": ("b_dec", "d")}
_STANDARD = {"W_enc": ("W_enc", "df"), "b_enc": ("b_enc", "f"), **_ENDS}
_JUMPRELU = {**_STANDARD, "threshold": ("threshold", "f")}
_GATED = {
    "W_enc": ("W_enc", "df"), "b_gate": ("b_gate", "f"), "b_mag": ("b_mag", "f"), "r_mag": ("r_mag", "f"), **_ENDS,
}  # fmt: skip
_LAYOUTS = {"standard": _STANDARD, "topk": _STANDARD, "jumprelu": _JUMPRELU, "gated": _GATED}

_OURS = {
    "standard": "relu", "topk": "top_k", "jumprelu": "jump_relu", "gated": "gated", "batchtopk": "batch_top_k",
    "matryoshka_batchtopk": "matryoshka_batch_top_k",
}  # fmt: skip
_THEIRS = {ours: theirs for theirs, ours in _OURS.items()} | {"jump_relu_tanh": "jumprelu"}
HOOKS = {
    "resid_pre": "hook_resid_pre", "resid_post": "hook_resid_post", "mlp_out": "hook_mlp_out",
    "attn_out": "hook_attn_out",
}  # fmt: skip
"""TransformerLens's names of our sites; what it calls `hook_mlp_in` lies before the norm, and ours behind it."""


def read(folder: Path) -> Dictionary:
    """The dictionary in a folder of SAELens, folded into our form.

    Weights of 16 bits become float32; `config["imported"]` says what they were, and where they are said to read.

    Raises:
        InteropError: a file is missing or damaged, the architecture is none of `standard`, `topk`, `jumprelu` and
            `gated`, the input is changed in a way that weights alone cannot stand for, or tensors do not fit.
    """
    path = folder / CONFIG
    config = _modern(path, read_config(path))
    architecture, metadata = config["architecture"], part(path, config, "metadata")
    _refuse_changed_input(path, config)
    if architecture not in _LAYOUTS:
        training = ": a training checkpoint; save it for inference first" if architecture in _OURS else ""
        raise InteropError(f"{path}: architecture {architecture!r} is none of {', '.join(_LAYOUTS)}{training}")
    tensors = read_tensors(folder / WEIGHTS)
    if "scaling_factor" in tensors and (tensors["scaling_factor"] == 1).all():
        del tensors["scaling_factor"]  # old versions wrote one that does nothing
    d_model, d_sae = count(path, config, "d_in"), count(path, config, "d_sae")
    weights = take(folder / WEIGHTS, tensors, _LAYOUTS[architecture], d_model, d_sae)
    if architecture == "gated":
        weights = from_gated(weights)
    if architecture == "topk" and config.get("rescale_acts_by_decoder_norm"):
        norms = torch.linalg.vector_norm(weights["W_dec"], dim=1).clamp(min=torch.finfo(torch.float64).tiny)
        weights |= {"W_enc": weights["W_enc"] * norms, "b_enc": weights["b_enc"] * norms}
        weights["W_dec"] = weights["W_dec"] / norms[:, None]
    known = {"format": "saelens", "dtype": precision(tensors)}
    known |= {key: metadata[key] for key in ("model_name", "hook_name") if metadata.get(key)}
    ours = _trained_as(path, config, metadata, d_sae) | {"imported": known}
    centered = bool(config.get("apply_b_dec_to_input", True))
    return fold(folder / WEIGHTS, weights, ours, centered=centered, ranked=architecture == "topk")


def write(dictionary: Dictionary, folder: Path, site: Site | None = None) -> None:
    """Write the dictionary as `topk` when it keeps each token's k largest, else as `standard` or `jumprelu`.

    Args:
        dictionary: what is written; thresholds and weights stay as they are, bit for bit.
        folder: where the two files go.
        site: where it reads, for the metadata; SAELens's evaluations want to know.

    Raises:
        ArtifactError: the disk does not take it.
    """
    config = dictionary.config
    metadata: dict[str, Any] = {
        "sae_lens_version": VERSION, "training_architecture": _THEIRS[config["architecture"]],
        "training_architecture_details": _details(config),
    }  # fmt: skip
    if site is not None:
        hook = {"hook_name": f"blocks.{site.layer}.{HOOKS[site.hook]}"} if site.hook in HOOKS else {}
        metadata |= {"model_name": site.model, "mind_atlas_site": site.slug, **hook}
    theirs: dict[str, Any] = {
        "d_in": dictionary.d_model, "d_sae": dictionary.d_sae, "dtype": "float32", "device": "cpu",
        "apply_b_dec_to_input": False, "normalize_activations": "none", "reshape_activations": "none",
    }  # fmt: skip
    if dictionary.rank_scale is not None:
        architecture, weights = "topk", unfold_ranked(dictionary, centered=False)
        theirs |= {"k": config["k"], "rescale_acts_by_decoder_norm": False}
    else:
        is_relu = config["architecture"] == "relu" and not dictionary.threshold.any()
        architecture, weights = "standard" if is_relu else "jumprelu", thresholded(dictionary)
    write_tensors(folder / WEIGHTS, put(_LAYOUTS[architecture], weights))
    write_config(folder / CONFIG, {"architecture": architecture, **theirs, "metadata": metadata})


def _modern(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """The config as version 6 would say it. Before, a TopK was a `standard` one whose activation function was topk."""
    config = config | {"architecture": str(config.get("architecture", "standard"))}
    function = config.get("activation_fn", config.get("activation_fn_str", "relu"))
    if function == "topk":
        config |= {"architecture": "topk", **part(path, config, "activation_fn_kwargs")}
    elif function != "relu":
        raise InteropError(f"{path}: activation function {function!r} is neither relu nor topk: name another folder")
    if "metadata" not in config:
        config["metadata"] = {key: config.get(key) for key in ("model_name", "hook_name")}
    return config


def _refuse_changed_input(path: Path, config: dict[str, Any]) -> None:
    normalized = config.get("normalize_activations") or "none"
    if normalized != "none":
        raise InteropError(
            f"{path}: normalize_activations = {normalized!r} needs more than the weights: fold it with SAELens and "
            "save again where it is one number for all (expected_average_only_in); else this dictionary cannot be held"
        )
    reshaped = config.get("reshape_activations") or "none"
    if reshaped != "none" or "hook_z" in str(config.get("hook_name")):
        raise InteropError(f"{path}: it reads the heads of an attention layer (hook_z), which no site here is")


def _details(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of the training by SAELens's names."""
    if config["architecture"] == "jump_relu_tanh":
        return {"jumprelu_sparsity_loss_mode": "tanh", "l0_coefficient": config.get("l1_coefficient")}
    return {key: config[key] for key in ("k", "l1_coefficient") if key in config}


def _trained_as(path: Path, config: dict[str, Any], metadata: dict[str, Any], d_sae: int) -> dict[str, Any]:
    """What `Dictionary.config` says of the training."""
    architecture = config["architecture"]
    details = part(path, metadata, "training_architecture_details")
    if architecture == "topk":
        return {"architecture": "top_k", "k": active(path, config, d_sae)}
    if architecture == "jumprelu":
        architecture = str(metadata.get("training_architecture"))
    k, penalty = details.get("k"), details.get("l1_coefficient")
    said: dict[str, Any] = {"architecture": _OURS.get(architecture, "jump_relu")}
    if architecture == "jumprelu" and details.get("jumprelu_sparsity_loss_mode") == "tanh":
        said["architecture"], penalty = "jump_relu_tanh", details.get("l0_coefficient")
    if isinstance(k, int | float) and k >= 1 and float(k).is_integer():  # theirs may be 32.5, which ours cannot say
        said["k"] = int(k)
    if isinstance(penalty, int | float) and said["architecture"] in PENALIZED:
        said["l1_coefficient"] = float(penalty)
    return said
