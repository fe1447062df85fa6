"""What the formats share: their files, checked before they are believed, and the fold between their form and ours.

    theirs   p = (x - b_dec) @ W_enc + b_enc, or without b_dec;   f = p where p > max(threshold, 0);
             x_hat = f @ W_dec + b_dec
    ours     b_dec folded into b_enc, decoder rows of unit norm: with n = |W_dec[i]|, z = n p and f = n f

A TopK keeps the k largest p of each token instead, and p * n may rank otherwise than p: ours ranks z * rank_scale,
with rank_scale = 1 / n. All folding is done in float64.
"""

import json
import pickle
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float64
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sae_core.artifacts import write_atomically
from sae_core.dictionary import Dictionary
from sae_core.dictionary.gated import as_threshold
from sae_core.errors import MindAtlasError

Layout = Mapping[str, tuple[str, str]]
"""For each tensor, by our name: its name in the file, and its axes there, `d` for d_model and `f` for d_sae."""

ROUNDING = 1e-6
"""How far from 1 the norm of a unit row may be in float32."""

_AXES = {"W_enc": "df", "W_dec": "fd"}
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_DAMAGE = (
    OSError, RuntimeError, ValueError, LookupError, EOFError, TypeError, AttributeError, AssertionError, MemoryError,
    ArithmeticError, struct.error, pickle.UnpicklingError, SafetensorError,
)  # fmt: skip
"""What torch's weights-only unpickler was seen to raise on files with one byte changed, and its like."""


class InteropError(MindAtlasError):
    """A folder that cannot be read as what it should be, or a dictionary that a format cannot hold."""


def read_config(path: Path) -> dict[str, Any]:
    """A JSON file with a table in it. Raises InteropError when it is missing or something else."""
    try:
        config = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise InteropError(f"{path} cannot be read ({error}): download the folder again") from None
    if not isinstance(config, dict):
        raise InteropError(f"{path} holds a {type(config).__name__} in place of a table: name another folder")
    return config


def part(path: Path, config: dict[str, Any], key: str) -> dict[str, Any]:
    """A table within the config; empty when there is none. Raises InteropError when it is something else."""
    table = config.get(key) or {}
    if not isinstance(table, dict):
        raise InteropError(f"{path} says {key} = {table!r}, which should be a table: the file is damaged")
    return table


def count(path: Path, config: dict[str, Any], key: str) -> int:
    """A positive whole number of the config. Raises InteropError when it is missing or something else."""
    if key not in config:
        raise InteropError(f"{path} lacks {key}, without which the weights mean nothing: add it")
    value = config[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InteropError(f"{path} says {key} = {value!r}: expected a whole number of at least 1")
    return value


def active(path: Path, config: dict[str, Any], d_sae: int) -> int:
    """k of the config, a count of features. Raises InteropError as `count`, or when there are not so many."""
    k = count(path, config, "k")
    if k > d_sae:
        raise InteropError(f"{path} says k = {k}, more than its {d_sae} features: the file is damaged")
    return k


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors or torch file; of the latter only one that holds nothing but tensors by name.

    Raises:
        InteropError: the file is missing, damaged, or holds what only running its code could read.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except _DAMAGE as error:
        why = str(error) if path.suffix == ".safetensors" else type(error).__name__  # torch's advice is to run it
        raise InteropError(f"{path} cannot be read ({why}): it is damaged, or holds more than tensors") from None
    if not isinstance(tensors, dict) or not all(isinstance(tensor, Tensor) for tensor in tensors.values()):
        held = ", ".join(map(str, tensors)) if isinstance(tensors, dict) else type(tensors).__name__
        raise InteropError(f"{path} holds no table of tensors ({held[:200]}): give a finished dictionary's own file")
    return tensors


def take(path: Path, tensors: dict[str, Tensor], layout: Layout, d_model: int, d_sae: int) -> dict[str, Tensor]:
    """The tensors of a layout in float64, by our names and with our axes.

    Raises:
        InteropError: one is missing, too many, of another shape or type, or not finite.
    """
    expected = {name for name, _ in layout.values()}
    for names, verb in ((expected - tensors.keys(), "lacks"), (tensors.keys() - expected, "holds a foreign")):
        if names:
            raise InteropError(
                f"{path} {verb} {', '.join(sorted(map(str, names)))}: expected {', '.join(sorted(expected))}"
            )
    sizes, taken = {"d": d_model, "f": d_sae}, {}
    for ours, (name, axes) in layout.items():
        tensor, shape = tensors[name], tuple(sizes[axis] for axis in axes)
        if tuple(tensor.shape) != shape:
            turned = ", transposed" if tuple(tensor.shape) == shape[::-1] else ""
            raise InteropError(f"{path}: {name} is {tuple(tensor.shape)}{turned}; the config wants {shape}")
        if tensor.dtype not in _FLOATS:
            raise InteropError(f"{path}: {name} is {tensor.dtype}: expected floating-point numbers of 16 to 64 bits")
        if not tensor.isfinite().all():
            raise InteropError(f"{path}: {name} holds NaN or an infinity: the dictionary is broken, name another")
        taken[ours] = (tensor if axes == _AXES.get(ours, axes) else tensor.T).double()
    return taken


def put(layout: Layout, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What `take` undoes: the tensors in float32, by the layout's names and with its axes."""
    return {
        name: (weights[ours] if axes == _AXES.get(ours, axes) else weights[ours].T).float().contiguous().cpu()
        for ours, (name, axes) in layout.items()
    }


def precision(tensors: Mapping[str, Tensor]) -> str:
    """The type or types that the weights are stored in; ours is float32 whatever it was."""
    return "/".join(sorted({str(t.dtype).removeprefix("torch.") for t in tensors.values() if t.is_floating_point()}))


def from_gated(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A gated encoder as one with a threshold, exactly; see `as_threshold`."""
    scale, threshold = as_threshold(weights["b_gate"], weights["b_mag"], weights["r_mag"])
    folded = {"W_enc": weights["W_enc"] * scale, "b_enc": weights["b_mag"], "threshold": threshold}
    return {"W_dec": weights["W_dec"], "b_dec": weights["b_dec"], **folded}


def fold(
    path: Path, weights: dict[str, Tensor], config: dict[str, Any], *, centered: bool, ranked: bool = False
) -> Dictionary:
    """Our dictionary of their weights; see the module for both forms.

    Args:
        path: the file they are from, for messages.
        weights: W_enc, b_enc, W_dec, b_dec, and threshold where there is one.
        config: what `Dictionary.config` is to say.
        centered: b_dec is taken from the encoder's input.
        ranked: each token's `config["k"]` largest p are what fires.

    Raises:
        InteropError: a decoder row is all zeros, which no unit row can stand for; or float32 cannot hold the result.
    """
    W_enc, b_enc, W_dec, b_dec = (weights[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec"))
    norms: Float64[Tensor, " d_sae"] = torch.linalg.vector_norm(W_dec, dim=1)
    norms[(norms - 1).abs() < ROUNDING] = 1  # so that what has unit rows comes back bit for bit
    if not norms.all():
        zero = int((norms == 0).nonzero()[0])
        raise InteropError(f"{path}: feature {zero} has a decoder row of zeros, so it says nothing: remove it first")
    if centered:
        b_enc = b_enc - b_dec @ W_enc
    threshold = weights.get("threshold", torch.zeros_like(b_enc)).clamp(min=0)
    tensors = {
        "W_enc": W_enc * norms, "b_enc": b_enc * norms, "W_dec": W_dec / norms[:, None], "b_dec": b_dec,
        "threshold": threshold * norms,
    }  # fmt: skip
    if ranked:
        tensors["rank_scale"] = 1 / norms
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    if beyond := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise InteropError(f"{path}: {beyond[0]} becomes too large for float32: the dictionary is broken, name another")
    return Dictionary(**tensors, config=config)


def unfold_ranked(dictionary: Dictionary, *, centered: bool) -> dict[str, Tensor]:
    """Their weights of a dictionary that keeps each token's k largest: what `fold` with `ranked` undoes."""
    assert dictionary.rank_scale is not None, "only such a dictionary has ranks"
    scale, b_dec = dictionary.rank_scale.double(), dictionary.b_dec.double()
    W_enc, b_enc = dictionary.W_enc.double() * scale, dictionary.b_enc.double() * scale
    if centered:
        b_enc = b_enc + b_dec @ W_enc
    return {"W_enc": W_enc, "b_enc": b_enc, "W_dec": dictionary.W_dec.double() / scale[:, None], "b_dec": b_dec}


def thresholded(dictionary: Dictionary) -> dict[str, Tensor]:
    """The weights of a dictionary with thresholds, as they are: JumpReLU without centering holds them bit for bit."""
    return {name: getattr(dictionary, name) for name in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}


def write_config(path: Path, config: dict[str, Any]) -> None:
    """Write a JSON file. Raises ArtifactError when the disk does not take it."""
    with write_atomically(path) as temporary:
        temporary.write_text(json.dumps(config, indent=1) + "\n", "utf-8")


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors or torch file. Raises ArtifactError when the disk does not take it."""
    with write_atomically(path) as temporary:
        save_file(tensors, temporary) if path.suffix == ".safetensors" else torch.save(tensors, temporary)
