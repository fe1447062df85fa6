"""Text from a language model, token by token: in batches, seeded, steered, with the log-probability of each token.

An edit is in place only while the model computes a token, so that streams with and without steering may take turns on
one model.
"""

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_core.language_model import LanguageModel, Message, ModelError
from sae_core.steering import Steering


class Prompt(NamedTuple):
    """What is to be continued."""

    ids: list[int]
    last_turn: int = 0
    """Place of the first token that the last user turn says; 0 of plain text."""


class Sampling(NamedTuple):
    """How tokens are drawn, and where a text ends."""

    max_tokens: int = 128
    """Tokens at most; a text ends earlier where the model ends its answer, or at the end of its context."""
    temperature: float = 0.0
    """0 takes the likeliest token; otherwise logits are divided by it and tokens drawn."""
    top_p: float = 1.0
    """Tokens are drawn from the fewest likeliest that together are this likely (Holtzman et al. 2020)."""
    seed: int = 0
    """Of the drawing. Every token takes one uniform number, so that two streams of a seed draw alike."""
    stop: tuple[str, ...] = ()
    """Texts that end the answer and are no part of it."""
    watched: tuple[tuple[int, ...], ...] = ()
    """Sets of tokens; how likely one of each is to be drawn is told at every token."""


class Token(NamedTuple):
    """A token that was drawn."""

    id: int
    logprob: float
    """Natural logarithm of its probability under the (steered) model, whatever the temperature."""
    text: str
    """What can be shown now: whole characters, and nothing that may yet become a stop text."""
    finish: str = ""
    """Why this is the last: `stop` (the model's own end or a stop text) or `length`; empty when more follow."""
    watched: tuple[float, ...] = ()
    """Probability that it would be of each set that is watched, at the temperature of the sampling."""


def read_prompt(lm: LanguageModel, prompt: str | Sequence[Message]) -> Prompt:
    """The prompt's tokens, through the model's chat template when it is a conversation and there is one.

    Raises ModelError when the prompt is empty or fills the model's context.
    """
    ids = lm.prompt_ids(prompt)
    turns = [] if isinstance(prompt, str) else [dict(message) for message in prompt]
    users = [i for i, turn in enumerate(turns) if turn["role"] == "user"]
    if not users or not lm.tokenizer.chat_template:
        return Prompt(ids)
    other = "\N{SNOWMAN}" if not turns[users[-1]]["content"].startswith("\N{SNOWMAN}") else "a"
    turns[users[-1]]["content"] = other  # where the two conversations part, the last user turn begins
    same = (a == b for a, b in zip(ids, lm.prompt_ids(turns), strict=False))
    return Prompt(ids, next(i for i, equal in enumerate([*same, False]) if not equal))


def stream(lm: LanguageModel, prompt: Prompt, sampling: Sampling, steering: Steering | None = None) -> Iterator[Token]:
    """Continue one prompt; arguments and errors as in `generate`."""
    for tokens in generate(lm, [prompt], [sampling], steering):
        yield tokens[0]


def generate(
    lm: LanguageModel, prompts: Sequence[Prompt], samplings: Sequence[Sampling], steering: Steering | None = None
) -> Iterator[dict[int, Token]]:
    """Continue several prompts at once; yields, a step at a time, the new token of each row that has not ended.

    A row's text hangs on its own prompt, sampling and seed, but for rounding, which batches of other sizes do
    otherwise. Prompts of unequal length are padded on the left, with a mask and positions of their own.

    Args:
        lm: the model; one thread at a time.
        prompts: one a row.
        samplings: one a row.
        steering: what is done to the activations of every row, at the positions of its scope.

    Raises:
        ModelError: the temperature is negative or NaN, or top_p is not in (0, 1].
    """
    for sampling in samplings:
        _check(sampling)
    left = [min(s.max_tokens, lm.room(len(p.ids))) for p, s in zip(prompts, samplings, strict=True)]
    rngs = [torch.Generator().manual_seed(sampling.seed % 2**63) for sampling in samplings]
    texts = [_Text(lm.tokenizer, sampling.stop) for sampling in samplings]
    batch = _Batch(lm, prompts, steering)
    live = [row for row in range(len(prompts)) if left[row] > 0]
    while live:
        logits = batch.next_logits()
        logprobs = logits.log_softmax(-1)
        drawn = [_draw(logits[row], samplings[row], rngs[row]) if row in live else 0 for row in range(len(prompts))]
        tokens = {}
        for row in live:
            left[row] -= 1
            token = texts[row].token(drawn[row], float(logprobs[row, drawn[row]]), lm.stop_ids, left[row] == 0)
            tokens[row] = token._replace(watched=_watched(logits[row], samplings[row]))
        yield tokens
        live = [row for row in live if not tokens[row].finish]
        batch.append(drawn)


def side_by_side(
    lm: LanguageModel, prompt: Prompt, sampling: Sampling, steering: Steering
) -> Iterator[tuple[str, Token]]:
    """The model's answer as it is (`default`) and `steered`, a token of each in turn, drawn with the same seed."""
    streams = {"default": stream(lm, prompt, sampling), "steered": stream(lm, prompt, sampling, steering)}
    while streams:
        for name in list(streams):
            token = next(streams[name], None)
            if token is None:
                del streams[name]
            else:
                yield name, token


def _check(sampling: Sampling) -> None:
    if not sampling.temperature >= 0:
        raise ModelError(f"temperature = {sampling.temperature}: give 0 or more")
    if not 0 < sampling.top_p <= 1:
        raise ModelError(f"top_p = {sampling.top_p}: give more than 0 and at most 1")


class _Batch:
    """Rows in generation: what the model has read of them, and what it is to read next."""

    def __init__(self, lm: LanguageModel, prompts: Sequence[Prompt], steering: Steering | None) -> None:
        self._lm, self._steering, self._cache = lm, steering, None
        width = max((len(prompt.ids) for prompt in prompts), default=0)
        pads = [width - len(prompt.ids) for prompt in prompts]
        self._ids = self._tensor([[0] * pad + prompt.ids for pad, prompt in zip(pads, prompts, strict=True)])
        self._where = torch.ones_like(self._ids, dtype=torch.bool)
        if steering is not None:
            self._where = self._steered(prompts, pads)
        self._mask: Tensor | None = None
        if any(pads):
            self._mask = self._tensor([[0] * pad + [1] * (width - pad) for pad in pads])

    @torch.no_grad()
    def next_logits(self) -> Float[Tensor, "rows vocab"]:
        """Of the token that follows, float32."""
        inputs: dict[str, Any] = {"input_ids": self._ids, "past_key_values": self._cache}
        if self._mask is not None:
            positions = (self._mask.cumsum(1) - 1).clamp(min=0)[:, -self._ids.shape[1] :]
            inputs |= {"attention_mask": self._mask, "position_ids": positions}
        edit = nullcontext() if self._steering is None else self._steering.applied(self._lm, self._where)
        with edit:
            out = self._lm.model(**inputs, use_cache=True, logits_to_keep=1)
        self._cache = out.past_key_values
        return out.logits[:, -1].float()

    def append(self, ids: list[int]) -> None:
        """The token that each row goes on with."""
        self._ids = self._tensor(ids)[:, None]
        self._where = torch.ones_like(self._ids, dtype=torch.bool)
        if self._steering is not None and self._steering.scope == "no_special":
            self._where = ~self._special(self._ids)
        if self._mask is not None:
            self._mask = torch.cat([self._mask, torch.ones_like(self._ids)], dim=1)

    def _steered(self, prompts: Sequence[Prompt], pads: list[int]) -> Bool[Tensor, "rows length"]:
        """The prompts' positions in the steering's scope."""
        assert self._steering is not None
        places = torch.arange(self._ids.shape[1], device=self._ids.device)
        match self._steering.scope:
            case "all":
                return torch.ones_like(self._ids, dtype=torch.bool)
            case "generated":
                return torch.zeros_like(self._ids, dtype=torch.bool)
            case "last_turn":
                first = [pad + prompt.last_turn for pad, prompt in zip(pads, prompts, strict=True)]
                return places >= self._tensor(first)[:, None]
            case "no_special":
                return ~self._special(self._ids)

    def _special(self, ids: Int[Tensor, "rows length"]) -> Bool[Tensor, "rows length"]:
        return torch.isin(ids, self._tensor(self._lm.tokenizer.all_special_ids))

    def _tensor(self, values: Any) -> Tensor:
        return torch.tensor(values, device=self._lm.device, dtype=torch.long)


class _Text:
    """The text of one row."""

    def __init__(self, tokenizer: Any, stop: Sequence[str]) -> None:
        self._characters, self._stop, self._held = WholeCharacters(tokenizer), [s for s in stop if s], ""

    def token(self, token: int, logprob: float, ends: set[int], last: bool) -> Token:
        """What the token adds to the text that can be shown."""
        self._held += "" if token in ends else self._characters.add(token)
        if token in ends or last:
            self._held += self._characters.rest()
        found = min((at for stop in self._stop if (at := self._held.find(stop)) >= 0), default=-1)
        if found >= 0:
            return Token(token, logprob, self._held[:found], "stop")
        if token in ends or last:
            return Token(token, logprob, self._held, "stop" if token in ends else "length")
        kept = max((n for stop in self._stop for n in range(len(stop)) if self._held.endswith(stop[:n])), default=0)
        shown, self._held = self._held[: len(self._held) - kept], self._held[len(self._held) - kept :]
        return Token(token, logprob, shown)


class WholeCharacters:
    """Text of a stream of tokens; what ends in part of a character waits for the rest of it.

    Each piece is what the newest tokens add to the text of those just before, on which a token's text may depend.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._decode = partial(tokenizer.decode, skip_special_tokens=True)
        self._before: list[int] = []
        self._new: list[int] = []

    def add(self, token: int) -> str:
        """What can be shown now; empty while a character is not whole."""
        self._new.append(token)
        piece = self._added()
        if not piece or piece.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self._before, self._new = self._new, []
        return piece

    def rest(self) -> str:
        """What was kept back, at the end of the text."""
        piece = self._added() if self._new else ""
        self._new = []
        return piece

    def _added(self) -> str:
        return self._decode(self._before + self._new)[len(self._decode(self._before)) :]


def probabilities(logits: Float[Tensor, "*rows vocab"], temperature: float) -> Float[Tensor, "*rows vocab"]:
    """Those that tokens are drawn with; at temperature 0, all of it is the likeliest token's."""
    if not temperature:
        return torch.nn.functional.one_hot(logits.argmax(-1), logits.shape[-1]).float()
    return (logits / temperature).softmax(-1)


def _watched(logits: Float[Tensor, " vocab"], sampling: Sampling) -> tuple[float, ...]:
    if not sampling.watched:
        return ()
    drawn = probabilities(logits, sampling.temperature)
    return tuple(float(drawn[list(tokens)].sum()) for tokens in sampling.watched)


def _draw(logits: Float[Tensor, " vocab"], sampling: Sampling, rng: torch.Generator) -> int:
    """A token; where tokens are drawn, by the inverse of the distribution at one uniform number."""
    if sampling.temperature == 0:
        return int(logits.argmax())
    chances = probabilities(logits.double(), sampling.temperature)
    if sampling.top_p < 1:
        sorted_, order = chances.sort(descending=True)
        unlikely = sorted_.cumsum(0) - sorted_ >= sampling.top_p
        chances[order[unlikely]] = 0
    below = chances.cumsum(0)
    level = float(torch.rand(1, generator=rng, dtype=torch.double)) * float(below[-1])
    return int((below <= level).sum().clamp(max=len(below) - 1))
