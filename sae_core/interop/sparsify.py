"""sparsify: `cfg.json` and `sae.safetensors`; always a TopK, f = the k largest relu((x - b_dec) @ W_enc + b_enc)."""

from pathlib import Path
from typing import Any

from sae_core.dictionary import Dictionary
from sae_core.interop.foreign import (
    InteropError,
    active,
    count,
    fold,
    precision,
    put,
    read_config,
    read_tensors,
    take,
    unfold_ranked,
    write_config,
    write_tensors,
)
from sae_core.names import Site

CONFIG, WEIGHTS = "cfg.json", "sae.safetensors"
FILES = (CONFIG, WEIGHTS)

_LAYOUT = {
    "W_enc": ("encoder.weight", "fd"), "b_enc": ("encoder.bias", "f"), "W_dec": ("W_dec", "fd"),
    "b_dec": ("b_dec", "d"),
}  # fmt: skip
_FOREIGN = {
    "transcode": "it predicts one activation from another (a transcoder)",
    "skip_connection": "it adds a linear function of the input to the reconstruction",
    "signed": "it keeps the largest activations of either sign",
}


def read(folder: Path) -> Dictionary:
    """The dictionary in a folder of sparsify (one hookpoint of a run), folded into our form.

    Weights of 16 bits become float32; `config["imported"]` says what they were.

    Raises:
        InteropError: a file is missing or damaged, it is no plain TopK, or tensors do not fit.
    """
    path = folder / CONFIG
    config = read_config(path)
    if (activation := config.get("activation", "topk")) != "topk":
        raise InteropError(f"{path}: activation {activation!r} is not topk, the only one that can be held here")
    for key, why in _FOREIGN.items():
        if config.get(key):
            raise InteropError(f"{path}: {key} = {config[key]!r}: {why}, which no dictionary here does")
    d_model = count(path, config, "d_in")
    as_factor = not config.get("num_latents")
    d_sae = d_model * count(path, config, "expansion_factor") if as_factor else count(path, config, "num_latents")
    tensors = read_tensors(folder / WEIGHTS)
    weights = take(folder / WEIGHTS, tensors, _LAYOUT, d_model, d_sae)
    ours: dict[str, Any] = {"architecture": "top_k", "k": active(path, config, d_sae)}
    ours["imported"] = {"format": "sparsify", "dtype": precision(tensors)}
    return fold(folder / WEIGHTS, weights, ours, centered=True, ranked=True)


def write(dictionary: Dictionary, folder: Path, site: Site | None = None) -> None:
    """Write a dictionary that keeps each token's k largest activations.

    Args:
        dictionary: what is written.
        folder: where the two files go.
        site: where it reads, for the config.

    Raises:
        InteropError: it has thresholds, which sparsify does not know.
        ArtifactError: the disk does not take it.
    """
    if dictionary.rank_scale is None:
        raise InteropError(
            "sparsify knows only the k largest activations of each token, and this dictionary's features fire above "
            "thresholds: export it as saelens or dictionary_learning"
        )
    unit = bool((dictionary.rank_scale == 1).all())
    config = {
        "activation": "topk", "num_latents": dictionary.d_sae, "k": dictionary.config["k"], "d_in": dictionary.d_model,
        "normalize_decoder": unit, "multi_topk": False, "skip_connection": False, "transcode": False,
    }  # fmt: skip
    if site is not None:
        config["mind_atlas_site"] = site.slug
    write_tensors(folder / WEIGHTS, put(_LAYOUT, unfold_ranked(dictionary, centered=True)))
    write_config(folder / CONFIG, config)
