"""dictionary_learning: `ae.pt`, a state dict, and `config.json`, whose trainer names the class.

What each class computes:

    p = (x - b_dec) @ W_enc + b_enc
    AutoEncoder                            relu(p)
    AutoEncoderNew                         the same, without b_dec in p
    AutoEncoderTopK                        the k largest relu(p) of each token; its threshold is not used
    BatchTopKSAE, MatryoshkaBatchTopKSAE   relu(p) * (relu(p) > threshold), one threshold for all; -1 is none yet
    JumpReluAutoEncoder                    relu(p * (p > threshold)), without b_dec in p
    GatedAutoEncoder                       (p + gate_bias > 0) * relu(exp(r_mag) * p + mag_bias), p without b_enc
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sae_core.dictionary import Dictionary
from sae_core.interop.foreign import (
    InteropError,
    Layout,
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

CONFIG, WEIGHTS = "config.json", "ae.pt"
FILES = (CONFIG, WEIGHTS)


class _Class(NamedTuple):
    architecture: str
    layout: Layout
    centered: bool = True
    """b_dec is taken from the encoder's input."""
    whole: tuple[str, ...] = ()
    """Tensors of whole numbers beside those of the layout."""


_LINEAR = {"W_enc": ("encoder.weight", "fd"), "b_enc": ("encoder.bias", "f"), "W_dec": ("decoder.weight", "df")}
_PLAIN = {"W_enc": ("W_enc", "df"), "b_enc": ("b_enc", "f"), "W_dec": ("W_dec", "fd"), "b_dec": ("b_dec", "d")}
_ONE_THRESHOLD = {"threshold": ("threshold", "")}
_TOP_K = {**_LINEAR, "b_dec": ("b_dec", "d"), **_ONE_THRESHOLD}
_GATED = {
    "W_enc": ("encoder.weight", "fd"), "W_dec": ("decoder.weight", "df"), "b_dec": ("decoder_bias", "d"),
    "b_gate": ("gate_bias", "f"), "b_mag": ("mag_bias", "f"), "r_mag": ("r_mag", "f"),
}  # fmt: skip
_CLASSES = {
    "AutoEncoder": _Class("relu", {**_LINEAR, "b_dec": ("bias", "d")}),
    "AutoEncoderNew": _Class("relu", {**_LINEAR, "b_dec": ("decoder.bias", "d")}, centered=False),
    "AutoEncoderTopK": _Class("top_k", _TOP_K, whole=("k",)),
    "BatchTopKSAE": _Class("batch_top_k", _TOP_K, whole=("k",)),
    "MatryoshkaBatchTopKSAE": _Class(
        "matryoshka_batch_top_k", {**_PLAIN, **_ONE_THRESHOLD}, whole=("k", "group_sizes")
    ),
    "JumpReluAutoEncoder": _Class("jump_relu", {**_PLAIN, "threshold": ("threshold", "f")}, centered=False),
    "GatedAutoEncoder": _Class("gated", _GATED),
}
_TRAINERS = {
    "relu": "StandardTrainer", "top_k": "TopKTrainer", "batch_top_k": "BatchTopKTrainer",
    "matryoshka_batch_top_k": "MatryoshkaBatchTopKTrainer", "jump_relu": "JumpReluTrainer", "gated": "GatedSAETrainer",
    "jump_relu_tanh": "JumpReluTanhTrainer",
}  # fmt: skip
"""By our architecture, the class that trains such a one; theirs, but for the last, which has none there."""


def read(folder: Path) -> Dictionary:
    """The dictionary in a folder of dictionary_learning (`trainer_0`, say), folded into our form.

    Nothing of `ae.pt` is executed. Weights of 16 bits become float32; `config["imported"]` says what they were.

    Raises:
        InteropError: a file is missing or damaged, the class is none of those above, a threshold was never set, or
            tensors do not fit.
    """
    path, weights_path = folder / CONFIG, folder / WEIGHTS
    trainer = part(path, read_config(path), "trainer")
    name = trainer.get("dict_class")
    if not isinstance(name, str) or name not in _CLASSES:
        raise InteropError(f"{path}: trainer.dict_class = {name!r} is none of {', '.join(_CLASSES)}")
    kind, tensors = _CLASSES[name], read_tensors(weights_path)
    d_model, d_sae = count(path, trainer, "activation_dim"), count(path, trainer, "dict_size")
    whole = {key: tensors.pop(key) for key in kind.whole if key in tensors}
    weights = take(weights_path, tensors, kind.layout, d_model, d_sae)
    if "r_mag" in weights:
        weights = from_gated(weights)
    ranked = name == "AutoEncoderTopK"
    if ranked:
        del weights["threshold"]
    elif "threshold" in weights:
        weights["threshold"] = _set(weights_path, weights["threshold"]).expand(d_sae)
    config: dict[str, Any] = {"architecture": _architecture(kind, trainer)}
    if "k" in kind.whole or "k" in trainer:
        config["k"] = _k(path, trainer, whole.get("k"), d_sae, kind)
    elif config["architecture"] in PENALIZED and isinstance(penalty := trainer.get("l1_penalty"), int | float):
        config["l1_coefficient"] = float(penalty)
    config["imported"] = {"format": "dictionary_learning", "dtype": precision(tensors)}
    return fold(weights_path, weights, config, centered=kind.centered, ranked=ranked)


def write(dictionary: Dictionary, folder: Path, site: Site | None = None) -> None:
    """Write the dictionary as AutoEncoderTopK when it keeps each token's k largest, else as JumpReluAutoEncoder.

    The latter holds any thresholds bit for bit; `trainer_class` says what they come from.

    Args:
        dictionary: what is written.
        folder: where the two files go.
        site: where it reads, for the config.

    Raises:
        ArtifactError: the disk does not take it.
    """
    config = dictionary.config
    trainer: dict[str, Any] = {
        "trainer_class": _TRAINERS[config["architecture"]], "activation_dim": dictionary.d_model,
        "dict_size": dictionary.d_sae,
    }  # fmt: skip
    if "k" in config:
        trainer["k"] = config["k"]
    if "l1_coefficient" in config:
        trainer["l1_penalty"] = config["l1_coefficient"]
    if site is not None:
        trainer |= {"lm_name": site.model, "layer": site.layer, "submodule_name": site.slug}
    if dictionary.rank_scale is not None:
        name, weights = "AutoEncoderTopK", unfold_ranked(dictionary, centered=True) | {"threshold": torch.tensor(-1.0)}
    else:
        name, weights = "JumpReluAutoEncoder", thresholded(dictionary)
    tensors = put(_CLASSES[name].layout, weights)
    if name == "AutoEncoderTopK":
        tensors["k"] = torch.tensor(config["k"], dtype=torch.int32)
    write_tensors(folder / WEIGHTS, tensors)
    write_config(folder / CONFIG, {"trainer": {"dict_class": name, **trainer}})


def _set(path: Path, threshold: Tensor) -> Tensor:
    """The threshold of a BatchTopK; unset, it would let through all that is positive, hundreds of features a token."""
    if threshold.ndim == 0 and threshold < 0:
        raise InteropError(
            f"{path}: the threshold is {float(threshold):g}, which means that training ended before one was set: "
            "train beyond threshold_start_step, or set it"
        )
    return threshold


def _architecture(kind: _Class, trainer: dict[str, Any]) -> str:
    """What was trained; a JumpReluAutoEncoder may stand for any, as `write` uses it."""
    if kind.architecture != "jump_relu":
        return kind.architecture
    by_trainer = {theirs: ours for ours, theirs in _TRAINERS.items()}
    return by_trainer.get(str(trainer.get("trainer_class")), "jump_relu")


def _k(path: Path, trainer: dict[str, Any], buffer: Tensor | None, d_sae: int, kind: _Class) -> int:
    """k of the config, which must be the weights' own where these hold one."""
    k = active(path, trainer, d_sae)
    if "k" in kind.whole and (buffer is None or buffer.numel() != 1 or int(buffer) != k):
        held = "none" if buffer is None else buffer.tolist()
        raise InteropError(f"{path} says k = {k}, {WEIGHTS} holds {held}: the two files do not belong together")
    return k
