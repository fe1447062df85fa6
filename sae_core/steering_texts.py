"""Texts written under many kinds of steering at once, and what is measured on them.

All texts of a prompt are rows of one batch, those with an instruction before it apart: so none but these are padded.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sae_core.atlas import Atlas
from sae_core.dictionary import Dictionary
from sae_core.features import FeatureRow, Features
from sae_core.generation import Sampling, Token, generate, read_prompt
from sae_core.language_model import LanguageModel, Message
from sae_core.names import Site
from sae_core.progress import Report, silent
from sae_core.steering import Steer, Steering

_ROWS = 64
"""Texts written at once."""
_RESAMPLES = 2000
_LOGITS = 2**25
"""Logits held at once while texts are measured."""
_WHOLE = re.compile(r" [^\W\d_]{3,}")
"""A token that begins a word and is letters."""
_SELDOM = 1e-5
"""A word of a smaller share of a text's tokens is hardly one: vocabularies hold beginnings of words that never stand
alone."""
_SHARE = 0.05
"""A token stands for what a feature fires on when it has this share of its firings."""


@dataclass(frozen=True)
class Subject:
    """A model, and the dictionary whose features steer it."""

    lm: LanguageModel
    site: Site
    dictionary: Dictionary
    features: Features
    sink_norm: float

    @classmethod
    def open(cls, lm: LanguageModel, site: Site, dictionary: Path, features: Path, sink_norm: float) -> "Subject":
        """From the folders of the finished artifacts."""
        return cls(lm, site, Dictionary.load(dictionary, lm.device), Features.open(features), sink_norm)

    @classmethod
    def of(cls, atlas: Atlas, lm: LanguageModel, dictionary: Dictionary | None = None) -> "Subject":
        """Of an atlas; its dictionary is loaded unless it is given."""
        return cls(lm, atlas.site, dictionary or atlas.load_dictionary().to(lm.device), atlas.features, atlas.sink_norm)

    @cached_property
    def max_acts(self) -> Float[Tensor, " d_sae"]:
        """The largest activation of each feature over the corpus."""
        return torch.tensor(self.features.table()["max_act"].to_numpy())

    @cached_property
    def unembedding(self) -> Float[Tensor, "d_model vocab"]:
        """Logit lens; see `LanguageModel.unembedding`."""
        return self.lm.unembedding()

    @cached_property
    def shown(self) -> Bool[Tensor, " vocab"]:
        """Tokens of text: no special ones, none beyond the tokenizer."""
        shown = torch.zeros(self.unembedding.shape[1], dtype=torch.bool, device=self.lm.device)
        shown[: len(self.lm.tokenizer)] = True
        shown[[i for i in self.lm.tokenizer.all_special_ids if i < len(shown)]] = False
        return shown

    @cached_property
    def tokens(self) -> dict[str, list[int]]:
        """The tokens that are each word, see `words`."""
        found: dict[str, list[int]] = defaultdict(list)
        for token, word in enumerate(self.words):
            found[word].append(token)
        return found

    @cached_property
    def words(self) -> list[str]:
        """Each token as a word: without spaces around, in one case; empty without two letters or digits."""
        stripped = (string.strip().casefold() for string in self.lm.token_strings(range(self.lm.vocab_size)))
        return [word if sum(map(str.isalnum, word)) >= 2 else "" for word in stripped]

    def steering(
        self,
        steers: Sequence[Steer],
        rows: Bool[Tensor, "batch steers"] | None = None,
        directions: Float[Tensor, "steers d_model"] | None = None,
    ) -> Steering:
        """Steering with this dictionary; `rows` and `directions` as in `Steering`."""
        return Steering(
            self.site, self.dictionary, steers, self.max_acts,
            sink_norm=self.sink_norm, rows=rows, directions=directions,
        )  # fmt: skip

    def random_directions(self, n: int, seed: int) -> Float[Tensor, "n d_model"]:
        """Unit vectors, the same on every device."""
        drawn = torch.randn(n, self.dictionary.d_model, generator=torch.Generator().manual_seed(seed))
        return torch.nn.functional.normalize(drawn, dim=1).to(self.lm.device)

    def word_rates(self, token_ids: Int[np.ndarray, "*n"]) -> dict[str, float]:
        """Share of the tokens that each word has in a text."""
        counts = np.bincount(token_ids.reshape(-1), minlength=self.lm.vocab_size)
        rates: dict[str, float] = defaultdict(float)
        for token in np.flatnonzero(counts):
            rates[self.words[token]] += float(counts[token]) / token_ids.size
        return dict(rates)

    def concept(self, row: FeatureRow, rates: Mapping[str, float], at_most: float) -> list[str]:
        """The words that stand for a feature: those that it promotes, then those that it often fires on.

        Of these, the whole words that a text knows and that are rare in it: pieces of words, and words that are said
        anyway, show nothing when they come.

        Args:
            row: the feature.
            rates: of the words of a text, see `word_rates`.
            at_most: share of tokens that a word may have in it.
        """
        often = (t for t, share in zip(row.top_tokens, row.top_token_shares, strict=True) if share >= _SHARE)
        tokens = (token for token in (*row.promoted, *often) if _WHOLE.fullmatch(token))
        words = dict.fromkeys(token.strip().casefold() for token in tokens)
        return [word for word in words if _SELDOM <= rates.get(word, 0.0) <= at_most]


class Condition(NamedTuple):
    """How a text is steered."""

    steer: Steer | None = None
    direction: Tensor | None = None
    """What stands in for the feature's decoder row."""
    instruction: str = ""
    """Put before the prompt, as words of the user."""
    watched: tuple[tuple[int, ...], ...] = ()
    """Sets of tokens, see `generation.Sampling`."""


def with_controls(subject: Subject, steer: Steer, n: int, seed: int) -> dict[str, list[Condition]]:
    """A feature, as `feature`, and its controls: `random_direction`, which goes as far, and `random_feature`.

    Args:
        subject: the model and the dictionary.
        steer: what is done to the feature.
        n: random directions, and other live features at the same strength, that are drawn; fewer where there are fewer.
        seed: of the draws.
    """
    alive = np.flatnonzero(subject.max_acts.numpy() > 0)
    others = alive[alive != steer.feature]
    drawn = np.random.default_rng([seed, steer.feature]).choice(others, min(n, len(others)), replace=False)
    return {
        "feature": [Condition(steer)],
        "random_direction": [Condition(steer, d) for d in subject.random_directions(n, seed + steer.feature)],
        "random_feature": [Condition(steer._replace(feature=int(other))) for other in drawn],
    }


class Text(NamedTuple):
    """A text that was written."""

    condition: int
    """Its place in the list of conditions."""
    prompt: int
    seed: int
    prompt_ids: list[int]
    """Of the prompt alone, without an instruction: its perplexity is that of an answer to the prompt."""
    ids: list[int]
    watched: Float[np.ndarray, "tokens sets"]
    """At each token, the probability that it would be of a set that the condition watches."""


class Measures(NamedTuple):
    """What is measured on a text, whatever its concept."""

    nll: float
    """Mean negative log-likelihood of its tokens under the model as it is, nats."""
    repetition: float
    """Share of its token triples that were there before."""


def write_texts(
    subject: Subject, prompts: Sequence[str], conditions: Sequence[Condition], seeds: int, max_tokens: int,
    temperature: float, seed: int = 0, report: Report = silent,
) -> list[Text]:  # fmt: skip
    """A text for each condition, prompt and seed, by condition; the prompts are those of a user to the model.

    A prompt's texts of one seed draw with the same random numbers, whatever the condition.
    """
    texts: list[Text] = []
    total = len(prompts) * seeds * len(conditions)
    for number, prompt in enumerate(prompts):
        read = {c.instruction: read_prompt(subject.lm, user_says(prompt, c.instruction)) for c in conditions}
        plain = read_prompt(subject.lm, user_says(prompt)).ids
        asked: dict[bool, list[tuple[int, int]]] = defaultdict(list)
        for place, condition in enumerate(conditions):
            asked[bool(condition.instruction)] += [(place, n) for n in range(seeds)]
        for wanted in asked.values():
            for start in range(0, len(wanted), _ROWS):
                rows = wanted[start : start + _ROWS]
                drawn = [seed + 7919 * number + n for _, n in rows]  # a stride that no number of seeds reaches
                watched = [conditions[place].watched for place, _ in rows]
                samplings = [
                    Sampling(max_tokens, temperature, seed=s, watched=w) for s, w in zip(drawn, watched, strict=True)
                ]
                steering = condition_steering(subject, [conditions[place] for place, _ in rows])
                said: list[list[Token]] = [[] for _ in rows]
                prompts_of = [read[conditions[place].instruction] for place, _ in rows]
                for step in generate(subject.lm, prompts_of, samplings, steering):
                    for row, token in step.items():
                        said[row].append(token)
                for (place, n), tokens in zip(rows, said, strict=True):
                    seen = np.array([token.watched for token in tokens]).reshape(len(tokens), -1)
                    texts.append(Text(place, number, n, plain, [token.id for token in tokens], seen))
                report(len(texts), total, "texts")
    return texts


def user_says(prompt: str, instruction: str = "") -> list[Message]:
    """A conversation of one turn."""
    return [{"role": "user", "content": f"{instruction} {prompt}".strip()}]


def condition_steering(subject: Subject, conditions: Sequence[Condition]) -> Steering | None:
    """Each row as its condition wants it; None when none is steered."""
    steered = [(row, c.steer, c.direction) for row, c in enumerate(conditions) if c.steer]
    if not steered:
        return None
    rows = torch.zeros(len(conditions), len(steered), dtype=torch.bool)
    for column, (row, _, _) in enumerate(steered):
        rows[row, column] = True
    directions = [subject.dictionary.W_dec[s.feature] if d is None else d for _, s, d in steered]
    return subject.steering([steer for _, steer, _ in steered], rows, torch.stack(directions))


def measure_texts(subject: Subject, texts: Sequence[Text]) -> list[Measures]:
    """Measures of each text, in order."""
    measured: list[Measures] = []
    longest = max((len(t.prompt_ids) + len(t.ids) for t in texts), default=1)
    step = max(1, _LOGITS // (longest * subject.lm.vocab_size))
    for start in range(0, len(texts), step):
        some = texts[start : start + step]
        for text, nll in zip(some, _nll(subject.lm, some), strict=True):
            measured.append(Measures(nll, repetition(text.ids)))
    return measured


def _nll(lm: LanguageModel, texts: Sequence[Text]) -> list[float]:
    """What follows a row's end does not change what comes before: rows are filled up with anything."""
    wholes = [text.prompt_ids + text.ids for text in texts]
    width = max(map(len, wholes))
    ids = torch.tensor([whole + [0] * (width - len(whole)) for whole in wholes], device=lm.device)
    logprobs = lm.logits(ids)[:, :-1].float().log_softmax(-1).gather(2, ids[:, 1:, None]).squeeze(2)
    spans = [(len(text.prompt_ids) - 1, len(whole) - 1) for text, whole in zip(texts, wholes, strict=True)]
    return [-float(row[first:last].mean()) for row, (first, last) in zip(logprobs, spans, strict=True)]


def repetition(ids: Sequence[int]) -> float:
    """Share of the triples of neighboring tokens that are repeated; 0 of fewer than three tokens."""
    triples = list(zip(ids, ids[1:], ids[2:], strict=False))
    return 1 - len(set(triples)) / len(triples) if triples else 0.0


def concept_rate(subject: Subject, text: Text, concept: set[str]) -> float:
    """Share of a text's tokens that are, as words, of the concept."""
    return float(np.mean([subject.words[token] in concept for token in text.ids])) if text.ids else 0.0


def word_ids(subject: Subject, words: Sequence[str]) -> list[int]:
    """The tokens that are one of the words."""
    return [token for word in words for token in subject.tokens[word]]


def bootstrap(values: Float[np.ndarray, " n"], seed: int = 0) -> tuple[float, float]:
    """95% percentile interval of the mean (Efron 1979)."""
    drawn = np.random.default_rng(seed).integers(0, len(values), (_RESAMPLES, len(values)))
    low, high = np.quantile(values[drawn].mean(1), [0.025, 0.975])
    return float(low), float(high)
