"""Where to read a decoder: its layers, their sublayers and the final norm, found by structure and not by model name."""

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

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

    The attention is a child of a class called so; the MLP is the largest other child that has parts of its own. A layer
    that has no such child, as OPT's, may hold the MLP's matrices itself: its first linear child and its last. A
    sublayer that adds the residual stream to what it makes, as BLOOM's, puts out neither.
    """
    if hook in ("resid_pre", "resid_post"):
        return Site(layer, "input" if hook == "resid_pre" else "output")
    attention = [child for child in layer.children() if "attention" in type(child).__name__.lower()]
    parts = [child for child in layer.children() if child not in attention and len(list(child.children()))]
    linear = [child for child in layer.children() if isinstance(child, nn.Linear)]
    if hook == "attn_out":
        found, wanted = max(attention, key=_size, default=None), "no class named attention was found"
    elif parts or len(linear) < 2:
        found, wanted = max(parts, key=_size, default=None), "no sublayer beside the attention was found"
    else:
        found, wanted = linear[0 if hook == "mlp_in" else -1], ""
    if found is not None and hook != "mlp_in" and "residual" in inspect.signature(found.forward).parameters:
        found, wanted = None, f"{type(found).__name__} adds the residual stream to what it puts out"
    if found is None:
        raise ModelError(f"activations.hook = {hook}: {type(layer).__name__} has none ({wanted}): choose resid_post")
    return Site(found, "input" if hook == "mlp_in" else "output")


def find_neurons(layer: nn.Module, d_model: int) -> Site:
    """The neurons of a decoder layer's MLP: what goes into its last matrix, which leads back to the residual stream.

    Raises ModelError when it has no one such matrix, as a mixture of experts.
    """
    part = find_site(layer, "mlp_in").module
    holder = layer if isinstance(part, nn.Linear) else part  # OPT's layers hold the matrices themselves
    back = [child for child in holder.children() if _puts_out(child) == d_model]
    if not back:
        raise ModelError(f"{type(holder).__name__} has no neurons of its own: none of its matrices puts out {d_model}")
    return Site(back[-1], "input")


def _puts_out(module: nn.Module) -> int | None:
    """Width of what a matrix puts out, as `nn.Linear` and the `Conv1D` of `transformers` say it; None of all else."""
    return getattr(module, "out_features", getattr(module, "nf", None))


def find_post_norms(layers: nn.ModuleList, run: Callable[[], Any]) -> dict[nn.Module, nn.Module]:
    """Of each sublayer whose output goes through a norm on its way to the residual stream (Gemma 2, OLMo 2), that norm.

    Found by looking on: it is the other child of the layer that is handed the very tensor the sublayer gave.

    Args:
        layers: the decoder layers.
        run: a forward pass through them.
    """
    found: dict[nn.Module, nn.Module] = {}

    def watch(stack: ExitStack, layer: nn.Module) -> None:
        made: list[tuple[nn.Module, Tensor]] = []

        def given(module: nn.Module, args: tuple[Any, ...]) -> None:
            found.update({maker: module for maker, acts in made if args and args[0] is acts})

        def gave(module: nn.Module, _: Any, output: Any) -> None:
            made.append((module, output[0] if isinstance(output, tuple) else output))

        for child in layer.children():
            if list(child.children()):
                stack.callback(child.register_forward_hook(gave).remove)
            elif list(child.parameters()):
                stack.callback(child.register_forward_pre_hook(given).remove)

    with ExitStack() as stack:
        for layer in layers:
            watch(stack, layer)
        run()
    return found


def find_final_norm(decoder: nn.Module, d_model: int) -> nn.Module | None:
    """The norm after the last layer: of the decoder's children, the last with weights of shape [d_model] only."""
    norms = [child for child in decoder.children() if _is_norm(child, d_model)]
    return norms[-1] if norms else None


def _is_norm(module: nn.Module, d_model: int) -> bool:
    shapes = [tuple(parameter.shape) for parameter in module.parameters()]
    return bool(shapes) and all(shape == (d_model,) for shape in shapes)


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
