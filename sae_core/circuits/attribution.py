"""Why this token and not that one: the difference of two logits, parted among features at positions.

The site's activations x [length, d_model] are what the dictionary makes of them and what it misses, at each token t

    x_t = base_t + sum_i f_i(x_t) * W_dec[i] + error_t,    base_t = b_dec

and an attention sink, on which no dictionary is trained, stays as it is: base_t = x_t, no features, no error. Let m(x)
be the logit of the target less that of the other token, after the last token, and g = dm/dx. Then

    attribution of feature i at t = f_i(x_t) * (W_dec[i] . g_t)
    attribution of the error at t = error_t . g_t

(Templeton et al. 2024, "Features as computational intermediates"; attribution patching from a baseline without
features, Nanda 2023). They add up exactly to the derivative of m(base + s (x - base)) in s at s = 1, which is
m(x) - m(base) to first order; what that misses is `rest`. Integrated gradients (Sundararajan et al. 2017) take the mean
of g over s from 0 to 1 in its place: then rest is but the error of a sum of a few steps.

A transcoder's features are read at one site and act at another: f_i is of what it reads, x what it writes.
"""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor

from sae_core.dictionary import SparseActs
from sae_core.dictionary.sparse import dots
from sae_core.errors import MindAtlasError
from sae_core.prompt_reader import BATCH_TOKENS, PromptReader

MAX_TOKENS = 2048
"""Of a prompt: what the way back through the model keeps grows with it (1.2 GB at 2,000 tokens of SmolLM2-135M)."""
_UNLIKELY = 1e-5
"""A probability below this is none: what speaks for such a token explains nothing that the model would say."""


class AttributionError(MindAtlasError):
    """A prompt, or a choice between tokens, that nothing can be attributed for."""


class Choice(NamedTuple):
    """One of the two tokens."""

    id: int
    token: str
    logit: float
    probability: float


class Change(NamedTuple):
    """A feature's activation is made `act`."""

    feature: int
    act: float
    """In the units of activations; 0 takes the feature away."""
    position: int | None = None
    """At this token of the prompt; None: at all."""


class Node(NamedTuple):
    """A feature at a token of the prompt."""

    position: int
    feature: int
    act: float
    attribution: float


@dataclass(frozen=True)
class Attribution:
    """What a difference of two logits owes to each feature at each token, and to what no feature explains."""

    tokens: list[str]
    """Of the prompt; with the beginning that the model expects, where it does."""
    is_sink: Bool[Tensor, " length"]
    """Attention sinks, which have no features and stay as they are."""
    target: Choice
    against: Choice
    base: float
    """m(base): the difference of logits where the site holds nothing but the decoder's bias, and the sinks."""
    acts: SparseActs
    """Features that fire; rows are tokens."""
    values: Float32[Tensor, " nnz"]
    """The attribution of each, in logits."""
    errors: Float32[Tensor, " length"]
    """The attribution of each token's reconstruction error."""
    steps: int
    """Of integrated gradients; 0: the gradient at x alone."""
    notes: list[str]
    """What one should know of the tokens that were compared."""

    @property
    def difference(self) -> float:
        """m(x): the logit of the target less that of the other."""
        return self.target.logit - self.against.logit

    @property
    def of_features(self) -> float:
        """All features together."""
        return float(self.values.double().sum())

    @property
    def of_error(self) -> float:
        """All reconstruction errors together."""
        return float(self.errors.double().sum())

    @property
    def rest(self) -> float:
        """What is missing to m(x) - m(base): the model is not linear."""
        return self.difference - self.base - self.of_features - self.of_error

    @property
    def heat(self) -> Float32[Tensor, " length"]:
        """What the features at each token have together."""
        return torch.zeros_like(self.errors).index_add_(0, self.acts.row, self.values)

    def top(self, limit: int) -> Int[Tensor, " found"]:
        """Places in `acts` and `values` of the largest attributions, of either sign, the largest first."""
        return self.values.abs().argsort(descending=True, stable=True)[:limit]

    def node(self, place: int) -> Node:
        """The feature at one of these places."""
        acts = self.acts
        row, feature, act = int(acts.row[place]), int(acts.feature[place]), float(acts.value[place])
        return Node(row, feature, act, float(self.values[place]))

    def by_feature(self) -> dict[int, float]:
        """Each feature's attribution, all tokens together."""
        features, place = self.acts.feature.unique(return_inverse=True)
        sums = torch.zeros(len(features), device=place.device).index_add_(0, place, self.values)
        return dict(zip(features.tolist(), sums.tolist(), strict=True))


class Shared(NamedTuple):
    """A feature's attributions, all tokens together, in two prompts."""

    feature: int
    left: float
    right: float

    @property
    def stays(self) -> bool:
        """It speaks for the same side in both, in neither with less than half of its voice in the other."""
        return self.left * self.right > 0 and 0.5 <= self.left / self.right <= 2


def compared(left: Attribution, right: Attribution, limit: int) -> list[Shared]:
    """The features that matter most in either of two prompts, those first whose larger attribution is largest."""
    one, other = left.by_feature(), right.by_feature()
    rows = [Shared(i, one.get(i, 0.0), other.get(i, 0.0)) for i in sorted({*one, *other})]
    return sorted(rows, key=lambda row: -max(abs(row.left), abs(row.right)))[:limit]


class Trace:
    """A prompt, run up to the site of a dictionary, from where the model can be run on with anything put there.

    The layers before the site run once. Memory is bounded by the prompt's length: features are kept where they fire
    only, and ablations run `BATCH_TOKENS` tokens at a time.

    Attributes:
        ids: [1, length], the prompt's tokens.
        x: [length, d_model], float32, the activations where the dictionary's features act.
        acts: what fires on them.
        is_sink: [length].
        clean: [vocab], float32, next-token logits of the model as it is.
    """

    def __init__(self, reader: PromptReader, prompt: str) -> None:
        """Run the model.

        Raises:
            AttributionError: the prompt is too long, or the dictionary is a transcoder that does not say what it
                writes.
            PromptError: it holds no token.
            ModelError: it exceeds the model's context.
        """
        lm, self.dictionary = reader.lm, reader.dictionary
        if self.dictionary.config["architecture"] == "transcoder" and self.dictionary.writes is None:
            raise AttributionError(
                "the transcoder does not say which site it writes, where its features act: train it with writes and "
                "writes_layer"
            )
        ids = [*reader.start, *reader.ids(prompt)]
        if len(ids) > MAX_TOKENS:
            raise AttributionError(f"the prompt has {len(ids):,} tokens: give at most {MAX_TOKENS:,}")
        read = (reader.hook, reader.layer)
        self.lm, self._site = lm, self.dictionary.writes or read
        self.ids = torch.tensor([ids], device=lm.device)
        self._input, of, x = lm.capture_many([("resid_pre", self._site[1]), read, self._site], self.ids)
        self.x, of = x[0].float(), of[0].float()
        self.is_sink = of.norm(dim=1) > reader.sink_norm
        self.acts = _without(self.dictionary.encode_sparse(of), self.is_sink)
        self._resumes = False
        with torch.no_grad():
            self.clean = self.logits(self.x[None])[0]
            self._resumes = True
            self._resumes = torch.allclose(self.logits(self.x[None])[0], self.clean, rtol=1e-3, atol=1e-3)

    @property
    def tokens(self) -> list[str]:
        """The prompt's tokens as text."""
        return self.lm.token_strings(self.ids[0])

    @cached_property
    def base(self) -> Float32[Tensor, "length d_model"]:
        """The site without features and without error: the decoder's bias, and the sinks."""
        return torch.where(self.is_sink[:, None], self.x, self.dictionary.b_dec)

    def logits(self, x: Float[Tensor, "rows length d_model"]) -> Float32[Tensor, "rows vocab"]:
        """Next-token logits with each row of `x` at the site, differentiable in it."""
        kept = x.to(self._input.dtype, copy=True)  # the model may go on to add to it in place
        with ExitStack() as stack:
            if self._resumes:
                start = self._input.expand(len(x), -1, -1)
                stack.enter_context(self.lm.resumed(self._site[1], start))
            stack.enter_context(self.lm.edit(*self._site, lambda _: kept))
            return self.lm.last_logits(self.ids.expand(len(x), -1))[:, -1]

    def attribute(self, target: str | int = "", against: str | int = "", steps: int = 0) -> Attribution:
        """The difference of two logits, attributed to all features at all tokens.

        Args:
            target: the token that it is about, or text whose first token that is; empty: the likeliest.
            against: the token that it is held against, or text; empty: the likeliest other.
            steps: of integrated gradients (midpoint rule); 0 takes the gradient at x alone, one pass forward and back.

        Raises:
            AttributionError: a text holds no token, both begin with the same, or their logits are not finite.
        """
        notes: list[str] = []
        ids = self.choose(target, against, notes)
        chosen, other = (self._choice(token) for token in ids)
        notes += [
            f"the model gives {c.token!r} no probability ({c.probability:.1e})"
            for c in (chosen, other)
            if c.probability < _UNLIKELY
        ]
        if not math.isfinite(chosen.logit - other.logit):
            raise AttributionError(f"the logits of {chosen.token!r} and {other.token!r} are not finite: choose others")
        if bool(self.is_sink.all()):
            notes.append("all tokens are attention sinks, which have no features: give a longer prompt")
        g = self._gradient(ids, steps)
        acts, dictionary = self.acts, self.dictionary
        error = self.x - dictionary.decode(acts)
        error[self.is_sink] = 0
        with torch.no_grad():
            base = self.logits(self.base[None])[0, ids].tolist()
        return Attribution(
            tokens=self.tokens,
            is_sink=self.is_sink,
            target=chosen,
            against=other,
            base=base[0] - base[1],
            acts=acts,
            values=acts.value * dots(dictionary.W_dec, acts.feature, g, acts.row),
            errors=(error * g).sum(1),
            steps=steps,
            notes=notes,
        )

    def choose(self, target: str | int, against: str | int, notes: list[str] | None = None) -> list[int]:
        """The two tokens, as `attribute` takes them, which it raises as; `notes` takes what should be said of them."""
        notes = [] if notes is None else notes
        best = self.likeliest(self.clean, 2).tolist()
        chosen = None if target == "" else self._first(target, notes)
        other = None if against == "" else self._first(against, notes)
        if chosen is None:
            chosen = next(token for token in best if token != other)
        if other is None:
            other = next(token for token in best if token != chosen)
        if chosen == other:
            (same,) = self.lm.token_strings([chosen])
            raise AttributionError(f"{target!r} and {against!r} both begin with the token {same!r}: give two others")
        return [chosen, other]

    @torch.no_grad()
    def ablated(self, found: Attribution, places: Int[Tensor, " n"]) -> Float32[Tensor, " n"]:
        """By how much the difference of logits falls when a feature is taken away at a token, for each of `places`.

        The model runs on with x_t - f_i(x_t) * W_dec[i] in place of x_t: an attribution is a guess of this.
        """
        ids = [found.target.id, found.against.id]
        effects = [torch.empty(0, device=self.x.device)]
        for some in places.split(max(1, BATCH_TOKENS // len(self.x))) if len(places) else ():
            row, feature, act = self.acts.row[some], self.acts.feature[some], self.acts.value[some]
            x = self.x.repeat(len(some), 1, 1)
            x[torch.arange(len(some), device=x.device), row] -= act[:, None] * self.dictionary.W_dec[feature]
            logits = self.logits(x)[:, ids]
            effects.append(found.difference - (logits[:, 0] - logits[:, 1]))
        return torch.cat(effects)

    @torch.no_grad()
    def changed(self, changes: Sequence[Change]) -> Float32[Tensor, " vocab"]:
        """Next-token logits with features changed together, in no order; sinks stay as they are.

        Raises AttributionError when there is no such feature or token, or a feature is changed twice at a token.
        """
        x = self.x.clone()
        seen: set[tuple[int, int]] = set()
        for change in changes:
            rows = self._rows(change)
            if twice := seen & {(row, change.feature) for row in rows}:
                row, feature = min(twice)
                raise AttributionError(f"feature {feature} is changed twice at token {row}: change it once")
            seen |= {(row, change.feature) for row in rows}
            x[rows] += (change.act - self._acts(change.feature)[rows])[:, None] * self.dictionary.W_dec[change.feature]
        return self.logits(x[None])[0]

    def likeliest(self, logits: Float32[Tensor, " vocab"], limit: int) -> Int[Tensor, " limit"]:
        """The tokens that follow most likely, the likeliest first."""
        return logits.topk(min(limit, len(logits))).indices

    def _rows(self, change: Change) -> list[int]:
        """The tokens at which a feature is changed."""
        if not 0 <= change.feature < self.dictionary.d_sae:
            raise AttributionError(
                f"feature {change.feature} does not exist: the dictionary has 0 to {self.dictionary.d_sae - 1}"
            )
        every = (~self.is_sink).nonzero().squeeze(1).tolist()
        if change.position is None:
            return every
        if not 0 <= change.position < len(self.x):
            raise AttributionError(f"there is no token {change.position}: the prompt has 0 to {len(self.x) - 1}")
        return [change.position] if change.position in every else []

    def _acts(self, feature: int) -> Float32[Tensor, " length"]:
        """What a feature has on each token."""
        its = self.acts.feature == feature
        return self.x.new_zeros(len(self.x)).index_copy_(0, self.acts.row[its], self.acts.value[its])

    def _gradient(self, ids: list[int], steps: int) -> Float32[Tensor, "length d_model"]:
        """dm/dx at x, or its mean at as many points between the base and x."""
        points = [(step + 0.5) / steps for step in range(steps)] or [1.0]
        total = torch.zeros_like(self.x)
        for point in points:
            at = (self.base + point * (self.x - self.base)).requires_grad_()
            with torch.enable_grad():
                logits = self.logits(at[None])[0]
                (g,) = torch.autograd.grad(logits[ids[0]] - logits[ids[1]], at)
            total += g / len(points)
        return total

    def _first(self, text: str | int, notes: list[str]) -> int:
        if isinstance(text, int):
            return text
        ids = self.lm.tokenizer(text, add_special_tokens=False).input_ids
        if not ids:
            raise AttributionError(f"{text!r} holds no token: give a word, with the space before it")
        if len(ids) > 1:
            (first,) = self.lm.token_strings(ids[:1])
            notes.append(f"{text!r} has {len(ids)} tokens: the first, {first!r}, stands for it")
        return int(ids[0])

    def _choice(self, token: int) -> Choice:
        (string,) = self.lm.token_strings([token])
        return Choice(token, string, float(self.clean[token]), float(self.clean.softmax(0)[token]))


def _without(acts: SparseActs, is_sink: Bool[Tensor, " length"]) -> SparseActs:
    """The activations of the tokens that are no sinks."""
    kept = ~is_sink[acts.row]
    return SparseActs(acts.row[kept], acts.feature[kept], acts.value[kept], acts.n_rows)
