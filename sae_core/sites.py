"""Where to read a decoder: its layers, their sublayers and the final norm, found by structure and not by model name."""

from typing import Literal, NamedTuple

from torch import nn

from sae_core.names import Hook
from sae_core.pretrained import ModelError


class Site(NamedTuple):
    """A module, and the side of it on which the activation lies."""

    module: nn.Module
    side: Literal["input", "output"]


def find_layers(decoder: nn.Module, n_layers: int) -> nn.ModuleList:
    """The decoder layers: of the lists of that many modules, the one that holds most weights.

    Raises ModelError when there is none.
    """
    lists = [m for m in decoder.modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers]
    if not lists:
        raise ModelError(f"{type(decoder).__name__} is not supported: it holds no nn.ModuleList of {n_layers} layers")
    return max(lists, key=_size)


def find_site(layer: nn.Module, hook: Hook) -> Site:
    """The site in a decoder layer. Raises ModelError, with what was looked for, when the layer has no such part.

    The attention is a child of a class called so; the MLP is the largest other child that has parts of its own.
    """
    if hook in ("resid_pre", "resid_post"):
        return Site(layer, "input" if hook == "resid_pre" else "output")
    attention = [child for child in layer.children() if "attention" in type(child).__name__.lower()]
    parts = [child for child in layer.children() if child not in attention and len(list(child.children()))]
    found = attention if hook == "attn_out" else parts
    if not found:
        wanted = "class named attention" if hook == "attn_out" else "sublayer beside the attention"
        raise ModelError(
            f"activations.hook = {hook}: {type(layer).__name__} has none (no {wanted} was found): choose resid_post"
        )
    return Site(max(found, key=_size), "input" if hook == "mlp_in" else "output")


def find_final_norm(decoder: nn.Module, d_model: int) -> nn.Module | None:
    """The norm after the last layer: of the decoder's children, the last with weights of shape [d_model] only."""
    norms = [child for child in decoder.children() if _is_norm(child, d_model)]
    return norms[-1] if norms else None


def _is_norm(module: nn.Module, d_model: int) -> bool:
    shapes = [tuple(parameter.shape) for parameter in module.parameters()]
    return bool(shapes) and all(shape == (d_model,) for shape in shapes)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
