"""A Hugging Face language model, and the one place that reads and edits its activations.

Captures and edits go through PyTorch's hooks and change no weight; one model serves one thread at a time.
"""

import copy
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property, partial
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed
from transformers import Cache, PreTrainedModel

from sae_core.display import display_strings
from sae_core.names import Hook
from sae_core.pretrained import ModelError, expected_bos, load_outline, load_tokenizer, load_weights
from sae_core.progress import Report, silent
from sae_core.sites import Site, find_final_norm, find_layers, find_neurons, find_post_norms, find_site
from sae_core.study import ModelSettings

__all__ = ["Edit", "LanguageModel", "Message", "ModelError", "load_tokenizer", "places"]

Edit = Callable[[Tensor], Tensor]
EditFrom = Callable[[Tensor, Tensor], Tensor]
"""What becomes of the second site's activations, from the first's and its own."""
"""Takes the activations [batch, length, d_model] at a site and returns what replaces them."""
Message = Mapping[str, str]
"""One turn of a conversation: `role` (`system`, `user`, `assistant`) and `content`."""


class _Captured(Exception):
    """Ends a forward pass at the last site whose activation was wanted."""


class _Apart(NamedTuple):
    """Segments laid out in rows of their own, padded at the end, which in a causal model nothing sees."""

    run: Int[Tensor, "batch length"]
    """Row of each token."""
    place: Int[Tensor, "batch length"]
    """Its place there."""

    def spread(self, packed: Tensor, like: Tensor | None = None) -> Tensor:
        """Packed values in rows of their own; the padding keeps what `like` has there, or is 0."""
        shape = (int(self.run.max()) + 1, int(self.place.max()) + 1, *packed.shape[2:])
        rows = packed.new_zeros(shape) if like is None else like.clone()
        rows[self.run, self.place] = packed
        return rows

    def gather(self, rows: Tensor) -> Tensor:
        """Packed again."""
        return rows[self.run, self.place]


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
        context: most tokens in a row; None when the model names no bound.

    Raises:
        ModelError: the model has no decoder layers, or attends to later tokens.
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
        self._apart: _Apart | None = None
        self._restarts = True
        self._post_norms: dict[nn.Module, nn.Module] = {}
        if self.device.type != "meta":
            self._try_out()

    @classmethod
    def load(
        cls,
        settings: ModelSettings,
        device: str = "cpu",
        precision: Literal["bfloat16", "float16", "float32"] = "bfloat16",
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
        """The module at which an activation is read. Raises ModelError when the model has no such site.

        What a sublayer puts out is what it adds to the residual stream: after a norm of its own, where it has one.
        """
        if not 0 <= layer < self.n_layers:
            raise ModelError(
                f"activations.layer = {layer}: the model has layers 0 to {self.n_layers - 1}: give one of these"
            )
        module, side = find_site(self._layers[layer], hook)
        return Site(self._post_norms.get(module, module) if side == "output" else module, side)

    def capture(
        self,
        hook: Hook,
        layer: int,
        token_ids: Int[Tensor, "batch length"],
        segments: Int[Tensor, "batch length"] | None = None,
    ) -> Float[Tensor, "batch length d_model"]:
        """Activations at one site; arguments and errors as in `capture_many`."""
        return self.capture_many([(hook, layer)], token_ids, segments)[0]

    def capture_many(
        self,
        sites: Sequence[tuple[Hook, int]],
        token_ids: Int[Tensor, "batch length"],
        segments: Int[Tensor, "batch length"] | None = None,
    ) -> list[Float[Tensor, "batch length d_model"]]:
        """Activations at all the sites, in the model's precision, from one pass up to the last of them and no further.

        Args:
            sites: kind and decoder layer, counted from 0, of each.
            token_ids: tokens; every row is full, there is no padding mask.
            segments: attention and position ids restart wherever the id changes, so that each run of equal ids gets
                the activations it would get alone. Where the model itself would let attention run on, the runs are
                given to it in rows of their own.

        Raises:
            ModelError: the model has no such site, the rows exceed its context, or it was to be compiled and cannot.
        """
        names = [f"{hook} of layer {layer}" for hook, layer in sites]
        return self._capture([(self.site(*site), site[1]) for site in sites], names, token_ids, segments)

    def capture_neurons(
        self,
        layers: Sequence[int],
        token_ids: Int[Tensor, "batch length"],
        segments: Int[Tensor, "batch length"] | None = None,
    ) -> list[Float[Tensor, "batch length d_mlp"]]:
        """What goes into the last matrix of each layer's MLP: its neurons' activations, times their gates where it has
        such. Arguments and errors as in `capture_many`; ModelError also when an MLP has no such matrix."""
        sites = [(find_neurons(self._layers[layer], self.d_model), layer) for layer in layers]
        return self._capture(sites, [f"neurons of layer {layer}" for layer in layers], token_ids, segments)

    @torch.no_grad()
    def _capture(
        self, sites: Sequence[tuple[Site, int]], names: Sequence[str], token_ids: Tensor, segments: Tensor | None
    ) -> list[Tensor]:
        """What lies at the sites, each in its layer, from one pass up to the last of them."""
        found: dict[int, Tensor] = {}

        def keep(number: int) -> Edit:
            def visit(acts: Tensor) -> Tensor:
                found[number] = acts
                if len(found) == len(sites):
                    raise _Captured
                found[number] = acts.clone()  # the model may go on to add to it in place
                return acts

            return visit

        with ExitStack() as stack:
            for number, (site, layer) in enumerate(sites):
                stack.enter_context(self._attached(site, layer, keep(number)))
            try:
                self._run(self._decoder, token_ids, segments)
            except _Captured:
                return [found[number] for number in range(len(sites))]
            except BackendCompilerFailed as error:
                cause = str(error).partition("\n")[0]
                raise ModelError(f"the model cannot be compiled, {cause}: set activations.compiled = false") from error
        lacking = [name for number, name in enumerate(names) if number not in found]
        raise ModelError(f"{', '.join(lacking)} is not reached in a forward pass: choose another hook")

    def compile(self, read: Collection[int]) -> None:
        """Compile the layers before the last of those that are read, but for these, which stay as they are.

        Layers of one kind share what is compiled. It happens when a pass first has a batch of some rows, and once more
        for batches of other sizes.
        """
        for layer, module in enumerate(self._layers[: max(read)]):
            if layer not in read:  # its hooks, inside of the layer, are not for the compiler
                module.forward = torch.compile(module.forward)

    def is_special(self, token_ids: Int[Tensor, "*n"], positions: Int[Tensor, "*n"]) -> Bool[Tensor, "*n"]:
        """Whether each token stands for no text: a beginning at position 0 of its document, or an end of text anywhere.

        A beginning counts where the model expects one. Padding is known by where it is and never by its id, which many
        tokenizers share with a token of text.
        """
        special = torch.zeros_like(token_ids, dtype=torch.bool)
        if self.tokenizer is None:
            return special
        if (eos := self.tokenizer.eos_token_id) is not None:
            special |= token_ids == eos
        if (bos := expected_bos(self.tokenizer)) is not None:
            special |= (token_ids == bos) & (positions == 0)
        return special

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
        with self._attached(self.site(hook, layer), layer, fn):
            yield

    @contextmanager
    def edit_from(self, read: tuple[Hook, int], written: tuple[Hook, int], fn: EditFrom) -> Iterator[None]:
        """As `edit` of the site `written`, by `fn` of the activations at `read`, earlier in the pass, and of its own.

        Raises ModelError when the model has no such site.
        """
        seen: list[Tensor] = []

        def look(acts: Tensor) -> Tensor:
            seen[:] = [acts.clone()]  # the model may go on to add to it in place
            return acts

        with ExitStack() as stack:
            if read == written:
                stack.enter_context(self.edit(*written, lambda acts: fn(acts, acts)))
            else:
                stack.enter_context(self.edit(*read, look))
                stack.enter_context(self.edit(*written, lambda acts: fn(seen[0], acts)))
            yield

    @contextmanager
    def resumed(self, layer: int, acts: Float[Tensor, "batch length d_model"]) -> Iterator[None]:
        """Inside the `with`, forward passes begin at `layer`, whose input is `acts`; what comes before costs nothing.

        The tokens of such a pass say its shape and no more. Models in which later layers read more than the residual
        stream give other logits: compare once.
        """

        def skip(as_tuple: bool, hidden_states: Tensor, *_: Any, **__: Any) -> Any:
            return (hidden_states, None) if as_tuple else hidden_states

        with ExitStack() as stack:
            for module, as_tuple in zip(self._layers[:layer], self._as_tuple, strict=False):
                module.forward = partial(skip, as_tuple)
                stack.callback(module.__dict__.pop, "forward")
            stack.enter_context(self.edit("resid_pre", layer, lambda _: acts))
            yield

    @cached_property
    @torch.no_grad()
    def _as_tuple(self) -> list[bool]:
        """Whether each layer returns a tuple."""
        found: list[bool] = []
        with ExitStack() as stack:
            for module in self._layers:
                look = module.register_forward_hook(lambda _, __, output: found.append(isinstance(output, tuple)))
                stack.callback(look.remove)
            self._decoder(input_ids=torch.zeros(1, 1, dtype=torch.long, device=self.device), use_cache=False)
        return found

    @torch.no_grad()
    def logits(
        self, token_ids: Int[Tensor, "batch length"], segments: Int[Tensor, "batch length"] | None = None
    ) -> Float[Tensor, "batch length vocab"]:
        """Next-token logits in the model's precision; arguments and errors as in `capture`."""
        return self._run(self.model, token_ids, segments).logits

    def last_logits(self, token_ids: Int[Tensor, "batch length"], count: int = 1) -> Float[Tensor, "batch count vocab"]:
        """Logits after the last tokens of each row, float32; differentiable in what an edit puts in.

        Raises ModelError when the rows exceed the model's context.
        """
        head = self.model.get_output_embeddings()
        with ExitStack() as stack:
            # Rows cut out of longer ones would be multiplied one by one, each with the whole embedding.
            stack.callback(head.register_forward_pre_hook(lambda _, args: (args[0].contiguous(),)).remove)
            return self.model(**self._inputs(token_ids), logits_to_keep=count).logits.float()

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
        from sae_core.generation import Sampling, read_prompt, stream  # which is made of this module

        for token in stream(self, read_prompt(self, prompt), Sampling(max_tokens, temperature, seed=seed)):
            if token.text:
                yield token.text

    def prompt_ids(self, prompt: str | Sequence[Message]) -> list[int]:
        """Tokens of a prompt, as `generate` reads it. Raises ModelError when it is empty or fills the context."""
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

    def room(self, length: int) -> int:
        """Tokens for which the context has room after so many."""
        return sys.maxsize if self.context is None else self.context - length

    @cached_property
    def stop_ids(self) -> set[int]:
        """Tokens with which the model ends what it says."""
        ends = self.model.generation_config.eos_token_id
        return {*(ends if isinstance(ends, list) else [ends]), self.tokenizer.eos_token_id} - {None}

    @cached_property
    def _display(self) -> list[str]:
        return display_strings(self.tokenizer, self.vocab_size)

    def _run(self, module: Any, token_ids: Tensor, segments: Tensor | None) -> Any:
        """A forward pass of the decoder or of the whole model; logits come packed as the tokens went in."""
        if segments is None or self._restarts:
            return module(**self._inputs(token_ids, segments))
        positions = places(segments.to(self.device))
        run = (positions == 0).flatten().cumsum(0).view_as(positions) - 1
        self._apart = apart = _Apart(run, positions)
        try:
            output = module(**self._inputs(apart.spread(token_ids.to(self.device))))
        finally:
            self._apart = None
        if "logits" in output:
            output.logits = apart.gather(output.logits)
        return output

    def _inputs(self, token_ids: Tensor, segments: Tensor | None = None) -> dict[str, Any]:
        """Arguments of a forward pass; `transformers` masks attention across places where position ids restart.

        It does so in most models; `_try_out` finds out.
        """
        self._check_length(token_ids.shape[1])
        inputs = {"input_ids": token_ids.to(self.device).long(), "use_cache": False}
        if segments is None:
            return inputs
        positions, axes = places(segments.to(self.device)), self._position_axes
        return inputs | {"position_ids": positions if axes is None else positions.expand(axes, -1, -1)}

    @cached_property
    def _position_axes(self) -> int | None:
        """Rows of position ids that a model with multimodal rotary embeddings takes: of text, time, height and width.

        The text's are those that masks are made from (Qwen2-VL and its successors).
        """
        config = self._decoder.config
        rope = getattr(config, "rope_parameters", None) or {}
        return 4 if "mrope_section" in rope else None

    @torch.no_grad()
    def _try_out(self) -> None:
        """Learn from a few tokens what no configuration tells: the post-norms, and whether positions part segments.

        Two texts are run one after the other, again with the first changed, and again with the second. What a text may
        not see must move it by no more than rounding does, which is little beside what the first does to the second
        where attention runs on.

        Raises ModelError when an activation depends on later tokens.
        """
        rows = torch.tensor([[*range(1, 7), *range(7, 13)], [*range(13, 19), *range(7, 13)], [*range(1, 7)] * 2])
        ids, first, second = rows * 7 % self.vocab_size, slice(0, 6), slice(6, 12)
        last: list[tuple[Hook, int]] = [("resid_post", self.n_layers - 1)]
        found: list[Tensor] = []
        self._post_norms = find_post_norms(self._layers, lambda: found.extend(self.capture_many(last, ids)))
        [joined], [alone] = found, self.capture_many(last, ids[:1, second])
        seen = _distance(joined[0, second], joined[1, second]) / 4
        if _distance(joined[0, first], joined[2, first]) > seen:
            raise ModelError(f"{type(self.model).__name__} attends to later tokens: give a causal language model")
        [packed] = self.capture_many(last, ids, torch.arange(12).expand(3, -1) // 6)
        self._restarts = (
            _distance(packed[0, second], packed[1, second]) <= seen
            and _distance(packed[0, second], alone[0]) <= _distance(joined[0, second], alone[0]) / 4
        )

    def _check_length(self, length: int) -> None:
        if self.context is not None and length > self.context:
            raise ModelError(f"{length} tokens exceed the model's context of {self.context}: give fewer")

    @contextmanager
    def _attached(self, site: Site, layer: int, visit: Edit) -> Iterator[None]:
        """Inside the `with`, every forward pass calls `visit` with the activation and goes on with what it returns."""
        module, side = site
        shape: list[int] = []  # of the residual stream; some layers flatten it before the MLP

        def see(acts: Tensor) -> Tensor:
            whole = acts.view(*shape[:-1], -1)
            if self._apart is None:
                return visit(whole).reshape(acts.shape)
            return self._apart.spread(visit(self._apart.gather(whole)), like=whole).reshape(acts.shape)

        def on_layer(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            shape[:] = (args[0] if args else kwargs["hidden_states"]).shape

        def on_input(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
            if args:
                return (see(args[0]), *args[1:]), kwargs
            return args, kwargs | {"hidden_states": see(kwargs["hidden_states"])}

        def on_output(_: nn.Module, __: Any, output: Any) -> Any:
            return (see(output[0]), *output[1:]) if isinstance(output, tuple) else see(output)

        with ExitStack() as stack:
            stack.callback(self._layers[layer].register_forward_pre_hook(on_layer, with_kwargs=True).remove)
            if side == "input":
                stack.callback(module.register_forward_pre_hook(on_input, with_kwargs=True).remove)
            else:
                stack.callback(module.register_forward_hook(on_output).remove)
            yield


def _distance(a: Float[Tensor, "n d_model"], b: Float[Tensor, "n d_model"]) -> float:
    """Of the typical row; the median does not hear of single tokens that rounding sends to another expert."""
    return float(torch.linalg.vector_norm((a - b).float(), dim=-1).median())


def places(segments: Int[Tensor, "batch length"]) -> Int[Tensor, "batch length"]:
    """Place of each token in its run of equal ids."""
    columns = torch.arange(segments.shape[1], device=segments.device).expand_as(segments)
    starts = torch.ones_like(segments, dtype=torch.bool)
    starts[:, 1:] = segments[:, 1:] != segments[:, :-1]
    return columns - (columns * starts).cummax(dim=1).values
