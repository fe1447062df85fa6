"""A Hugging Face language model, and the one place that reads and edits its activations.

Captures and edits go through PyTorch's hooks and change no weight; one model serves one thread at a time.
"""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import Cache, PreTrainedModel

from sae_core.display import display_strings
from sae_core.names import Hook
from sae_core.pretrained import ModelError, load_outline, load_tokenizer, load_weights
from sae_core.progress import Report, silent
from sae_core.sites import Site, find_final_norm, find_layers, find_site
from sae_core.study import ModelSettings

__all__ = ["Edit", "LanguageModel", "Message", "ModelError", "load_tokenizer"]

Edit = Callable[[Tensor], Tensor]
"""Takes the activations [batch, length, d_model] at a site and returns what replaces them."""
Message = Mapping[str, str]
"""One turn of a conversation: `role` (`system`, `user`, `assistant`) and `content`."""


class _Captured(Exception):
    """Ends a forward pass at the site whose activation was wanted."""

    def __init__(self, acts: Tensor) -> None:
        self.acts = acts


class _Reached(Exception):
    """Ends a forward pass at the site of `capture_next`."""


class LanguageModel:
    """A causal language model with its tokenizer, for inference.

    Attributes:
        model: the `transformers` model, in evaluation mode.
        tokenizer: its tokenizer.
        device: where the weights are.
        n_layers: number of decoder layers.
        d_model: width of the residual stream.
        vocab_size: rows of the token embedding; may exceed the tokenizer's vocabulary.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: Any, device: str = "cpu") -> None:
        self.model: Any = model.to(device).eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.device = torch.device(device)
        config = self.model.config.get_text_config()
        self.n_layers: int = config.num_hidden_layers
        self.d_model: int = config.hidden_size
        self.vocab_size: int = self.model.get_input_embeddings().weight.shape[0]
        self.context: int | None = getattr(config, "max_position_embeddings", None)
        self._decoder: Any = self.model.get_decoder()
        self._layers = find_layers(self._decoder, self.n_layers)

    @classmethod
    def load(
        cls,
        settings: ModelSettings,
        device: str = "cpu",
        precision: Literal["bfloat16", "float32"] = "bfloat16",
        report: Report = silent,
    ) -> "LanguageModel":
        """The model with weights and arithmetic of the given precision.

        Raises:
            ModelError: it cannot be loaded, does not fit into memory, or is no decoder.
            CatalogError: it cannot be found or fetched.
        """
        weights = load_weights(settings, getattr(torch, precision), report)
        return cls(weights, load_tokenizer(settings), device)

    @classmethod
    def outline(cls, settings: ModelSettings, report: Report = silent) -> "LanguageModel":
        """The model without weights and tokenizer: enough to ask for its sites and its context; raises as `load`."""
        return cls(load_outline(settings, report), None, "meta")

    def site(self, hook: Hook, layer: int) -> Site:
        """The module at which an activation is read. Raises ModelError when the model has no such site."""
        if not 0 <= layer < self.n_layers:
            raise ModelError(
                f"activations.layer = {layer}: the model has layers 0 to {self.n_layers - 1}: give one of these"
            )
        return find_site(self._layers[layer], hook)

    @torch.no_grad()
    def capture(
        self,
        hook: Hook,
        layer: int,
        token_ids: Int[Tensor, "batch length"],
        segments: Int[Tensor, "batch length"] | None = None,
    ) -> Float[Tensor, "batch length d_model"]:
        """Activations at a site, in the model's precision; the model runs up to there and no further.

        Args:
            hook: kind of site.
            layer: decoder layer, counted from 0.
            token_ids: tokens; every row is full, there is no padding mask.
            segments: attention and position ids restart wherever the id changes, so that each run of equal ids gets
                the activations it would get alone.

        Raises:
            ModelError: the model has no such site, or the rows exceed its context.
        """
        handle = self._attach(hook, layer, _stop)
        try:
            self._decoder(**self._inputs(token_ids, segments))
        except _Captured as captured:
            return captured.acts
        finally:
            handle.remove()
        raise ModelError(f"{hook} of layer {layer} is not reached in a forward pass: choose another hook")

    @torch.no_grad()
    def capture_next(
        self, hook: Hook, layer: int, token_ids: Int[Tensor, "batch length"], cache: Cache
    ) -> Float[Tensor, "batch length d_model"]:
        """As `capture`, of tokens that follow those in the key-value cache, which takes them up.

        Raises ModelError when the model has no such site, or the tokens exceed its context.
        """
        found: list[Tensor] = []

        def visit(acts: Tensor) -> Tensor:
            found.append(acts)
            raise _Reached

        self._check_length(cache.get_seq_length() + token_ids.shape[1])
        with suppress(_Reached), self.edit(hook, layer, visit):
            self._decoder(input_ids=token_ids.to(self.device).long(), past_key_values=cache, use_cache=True)
        if not found:
            raise ModelError(f"{hook} of layer {layer} is not reached in a forward pass: choose another hook")
        return found[0]

    @contextmanager
    def edit(self, hook: Hook, layer: int, fn: Edit) -> Iterator[None]:
        """Replace the activation at a site by `fn` of it, in every forward pass inside the `with`.

        In generation `fn` sees the whole prompt first and then one token at a time. Edits at one site are applied in
        the order in which they were entered. Raises ModelError when the model has no such site.
        """
        handle = self._attach(hook, layer, fn)
        try:
            yield
        finally:
            handle.remove()

    @torch.no_grad()
    def logits(
        self, token_ids: Int[Tensor, "batch length"], segments: Int[Tensor, "batch length"] | None = None
    ) -> Float[Tensor, "batch length vocab"]:
        """Next-token logits in the model's precision; arguments and errors as in `capture`."""
        return self.model(**self._inputs(token_ids, segments)).logits

    @torch.no_grad()
    def unembedding(self) -> Float[Tensor, "d_model vocab"]:
        """Logit lens, float32: the output embedding with the final norm's gain folded in.

        A direction of the residual stream times this is what it adds to each token's logit, up to the positive factor
        by which the final norm divides. The gain is read off by asking the norm: one on a vector of alternating signs,
        which has mean 0 and mean square 1, so that LayerNorm and every RMSNorm leave it as it is but for gain and bias.
        """
        weight = self.model.get_output_embeddings().weight.float().T
        found = find_final_norm(self._decoder, self.d_model)
        if found is None:
            return weight.contiguous()
        norm = copy.deepcopy(found).float()
        signs = torch.ones(self.d_model, device=self.device)
        signs[1::2] = -1
        gain = (norm(signs) - norm(-signs)) / 2 * signs
        return gain[:, None] * weight

    def token_strings(self, ids: Sequence[int] | Int[Tensor, " n"]) -> list[str]:
        """Each token as text, with its leading space; bytes that are no whole character shown as `\\xe2`."""
        strings = self._display
        return [strings[i] for i in (ids.tolist() if isinstance(ids, Tensor) else ids)]

    def generate(
        self, prompt: str | Sequence[Message], max_tokens: int = 128, temperature: float = 0.0, seed: int = 0
    ) -> Iterator[str]:
        """Continue the prompt; yields pieces of text as they come, each of whole characters.

        Args:
            prompt: text to complete, or the turns of a conversation, to which the model's chat template is applied
                if it has one.
            max_tokens: tokens at most; ends earlier where the model ends its answer, or at the end of its context.
            temperature: 0 takes the likeliest token; otherwise logits are divided by it and tokens drawn.
            seed: of the drawing; the same seed gives the same text.

        Raises:
            ModelError: the prompt is empty or fills the model's context, or the temperature is negative or NaN.
        """
        if not temperature >= 0:
            raise ModelError(f"temperature = {temperature}: give 0 or more")
        ids = self._encode(prompt)
        room = max_tokens if self.context is None else min(max_tokens, self.context - len(ids))
        return _whole_characters(self.tokenizer, self._continue(ids, room, temperature, seed))

    def _continue(self, ids: list[int], max_tokens: int, temperature: float, seed: int) -> Iterator[int]:
        """Token ids that follow, up to the end of the answer."""
        rng = torch.Generator(self.device).manual_seed(seed)
        stop, cache, step = self._stop_ids, None, ids
        for _ in range(max_tokens):
            with torch.no_grad():
                batch = torch.tensor([step], device=self.device)
                out = self.model(batch, past_key_values=cache, use_cache=True, logits_to_keep=1)
                token = _draw(out.logits[0, -1].float(), temperature, rng)
            if token in stop:
                return
            yield token
            cache, step = out.past_key_values, [token]

    def _encode(self, prompt: str | Sequence[Message]) -> list[int]:
        if isinstance(prompt, str):
            ids = self.tokenizer(prompt)["input_ids"]
        elif self.tokenizer.chat_template:
            ids = self.tokenizer.apply_chat_template(list(prompt), add_generation_prompt=True)["input_ids"]
        else:
            ids = self.tokenizer("\n\n".join(message["content"] for message in prompt))["input_ids"]
        if not ids:
            raise ModelError("the prompt is empty: give at least one character")
        self._check_length(len(ids) + 1)
        return ids

    @cached_property
    def _stop_ids(self) -> set[int]:
        ends = self.model.generation_config.eos_token_id
        return {*(ends if isinstance(ends, list) else [ends]), self.tokenizer.eos_token_id} - {None}

    @cached_property
    def _display(self) -> list[str]:
        return display_strings(self.tokenizer, self.vocab_size)

    def _inputs(self, token_ids: Tensor, segments: Tensor | None) -> dict[str, Any]:
        """Arguments of a forward pass; `transformers` masks attention across places where position ids restart."""
        self._check_length(token_ids.shape[1])
        inputs = {"input_ids": token_ids.to(self.device).long(), "use_cache": False}
        return inputs if segments is None else inputs | {"position_ids": _positions(segments.to(self.device))}

    def _check_length(self, length: int) -> None:
        if self.context is not None and length > self.context:
            raise ModelError(f"{length} tokens exceed the model's context of {self.context}: give fewer")

    def _attach(self, hook: Hook, layer: int, visit: Edit) -> RemovableHandle:
        """Have every forward pass call `visit` with the activation and go on with what it returns."""
        module, side = self.site(hook, layer)

        def on_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            if args:
                return (visit(args[0]), *args[1:]), kwargs
            return args, kwargs | {"hidden_states": visit(kwargs["hidden_states"])}

        def on_output(_: nn.Module, __: Any, output: Any) -> Any:
            return (visit(output[0]), *output[1:]) if isinstance(output, tuple) else visit(output)

        if side == "input":
            return module.register_forward_pre_hook(on_input, with_kwargs=True)
        return module.register_forward_hook(on_output)


def _stop(acts: Tensor) -> Tensor:
    raise _Captured(acts)


def _positions(segments: Int[Tensor, "batch length"]) -> Int[Tensor, "batch length"]:
    """Place of each token in its segment."""
    places = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return places - (places * starts).cummax(dim=1).values


def _draw(logits: Float[Tensor, " vocab"], temperature: float, rng: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=rng))


def _whole_characters(tokenizer: Any, tokens: Iterator[int]) -> Iterator[str]:
    """Text of a stream of tokens; what ends in part of a character waits for the rest of it.

    Each piece is what the newest tokens add to the text of those just before, on which a token's text may depend.
    """
    before: list[int] = []
    new: list[int] = []
    piece = ""

    def added() -> str:
        text = tokenizer.decode(before + new, skip_special_tokens=True)
        return text[len(tokenizer.decode(before, skip_special_tokens=True)) :]

    for token in tokens:
        new.append(token)
        piece = added()
        if piece and not piece.endswith("\N{REPLACEMENT CHARACTER}"):
            yield piece
            before, new, piece = new, [], ""
    if piece:
        yield piece
