"""Which concepts have a feature, against how frequent they are; and features of a known formal meaning.

A concept is a word, and its tokens are the last ones of its occurrences, after a space and not followed by more of a
word. It has a feature when, of the as many tokens on which some feature is strongest, at least half are the concept's:
precision and recall at their break-even, so that neither a feature of half the dictionary nor one of a single
occurrence counts. This is stricter than the paper's question, whether a person would say that a feature is of it.
"""

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy.optimize import minimize

from sae_core.corpus.packing import Blocks
from sae_core.science.firings import Firings, Sample

LISTS = Path(__file__).with_name("concepts.toml")
LEAST_OCCURRENCES = 5
"""A rarer concept says nothing."""
BREAK_EVEN = 0.5
CONTEXT = 6
"""Tokens over which the log-likelihood ratio of a kind of text is summed at most."""


@dataclass(frozen=True)
class Concept:
    """A word, and where it stands in a sample."""

    kind: str
    name: str
    rows: Int[np.ndarray, " occurrences"]


def concept_lists() -> dict[str, list[str]]:
    """The names of each kind."""
    return {kind: words.split() for kind, words in tomllib.loads(LISTS.read_text("utf-8")).items()}


def occurrences(
    lists: Mapping[str, Sequence[str]], sample: Sample, blocks: Blocks, tokenizer: Any, strings: Sequence[str]
) -> list[Concept]:
    """The concepts that occur often enough in the sample; `strings` is the text of each token id."""
    goes_on = np.array([text[:1].isalpha() for text in strings])
    length = blocks.token_ids.shape[1]
    following = blocks.token_ids[sample.block, np.minimum(sample.offset + 1, length - 1)]
    ends = ~goes_on[following] | (sample.offset == length - 1)
    by_token = np.argsort(sample.token, kind="stable")
    found = []
    for kind, names in lists.items():
        for name in names:
            ids = tokenizer.encode(f" {name}", add_special_tokens=False)
            first, last = np.searchsorted(sample.token[by_token], [ids[-1], ids[-1] + 1])
            rows = by_token[first:last]
            rows = rows[(sample.offset[rows] >= len(ids) - 1) & ends[rows]]
            for back, token in enumerate(reversed(ids)):
                rows = rows[blocks.token_ids[sample.block[rows], sample.offset[rows] - back] == token]
            if len(rows) >= LEAST_OCCURRENCES:
                found.append(Concept(kind, name, np.sort(rows)))
    return found


def best_feature(rows: Int[np.ndarray, " occurrences"], firings: Firings) -> tuple[int, float]:
    """The feature that finds these tokens best, and its precision among as many of its strongest; -1 when none can."""
    counts = np.diff(firings.values.tocsr()[rows].tocsc().indptr)
    likely = np.flatnonzero(counts >= BREAK_EVEN * len(rows))
    shares = [float(np.isin(firings.strongest(int(f), len(rows)), rows).sum() / len(rows)) for f in likely]
    return (int(likely[np.argmax(shares)]), max(shares)) if shares else (-1, 0.0)


class Logistic(NamedTuple):
    """P(feature) = 1 / (1 + exp(-(intercept + slope * log10 x)))."""

    intercept: float
    slope: float
    loss: float
    """Mean negative log-likelihood, in nats."""

    @property
    def half(self) -> float:
        """The x at which half have one."""
        return float(10 ** np.clip(-self.intercept / self.slope, -30, 30)) if self.slope else float("nan")


def logistic(x: Float[np.ndarray, " n"], has: Bool[np.ndarray, " n"]) -> Logistic:
    """Fitted to the concepts of frequency x. A weak prior keeps what is separated finite."""
    z, sign = np.log10(x), np.where(has, 1.0, -1.0)

    def loss(p: Float[np.ndarray, " 2"]) -> float:
        return float(np.logaddexp(0, -sign * (p[0] + p[1] * (z - z.mean()))).mean())

    found = minimize(lambda p: loss(p) + 1e-4 * float(np.square(p).sum()), np.zeros(2)).x
    return Logistic(float(found[0] - found[1] * z.mean()), float(found[1]), loss(found))


class Proxy(NamedTuple):
    """A kind of text, and the feature that follows its log-likelihood ratio best."""

    kind: str
    share: float
    """Of the sample's tokens."""
    feature: int
    correlation: float
    """Pearson, with the ratio over the tokens."""
    purity: float
    """Share of the tokens in the upper half of the feature's range that stand in such text."""
    by_level: list[float]
    """The share by quintile of the feature's activations, weakest first."""


def likelihood_ratio(
    inside: Bool[np.ndarray, " tokens"], sample: Sample, blocks: Blocks, n_tokens: int
) -> Float[np.ndarray, " tokens"]:
    """For each token log P(s | kind) / P(s), largest over the s that end at it, of at most `CONTEXT` tokens.

    Both are products of token frequencies, with half a count added, after Bricken et al. 2023, whose frequencies within
    a kind come from its definition and not, as here, from documents of it. No less than 0, as what fires cannot be.
    """
    counts = [np.bincount(sample.token[mask], minlength=n_tokens) + 0.5 for mask in (inside, np.ones_like(inside))]
    ratio = np.log(counts[0] / counts[0].sum()) - np.log(counts[1] / counts[1].sum())
    return best_run(ratio, sample, blocks)


def best_run(ratio: Float[np.ndarray, " vocab"], sample: Sample, blocks: Blocks) -> Float[np.ndarray, " tokens"]:
    """For each token the largest sum of the ratios of some tokens that end at it, of at most `CONTEXT`; at least 0."""
    best, total = np.zeros(len(sample.token)), np.zeros(len(sample.token))
    for back in range(CONTEXT):
        there = sample.offset >= back
        total += np.where(there, ratio[blocks.token_ids[sample.block, np.maximum(sample.offset - back, 0)]], -np.inf)
        best = np.maximum(best, total)
    return best


def proxy(kind: str, inside: Bool[np.ndarray, " tokens"], ratio: Float[np.ndarray, " tokens"], f: Firings) -> Proxy:
    """The feature that correlates most with the ratio, and how well its activations tell the kind."""
    values, n = f.values.astype(np.float64), len(ratio)
    mean = np.asarray(values.mean(0)).ravel()
    std = np.sqrt(np.maximum(np.asarray(values.multiply(values).mean(0)).ravel() - mean**2, 0))
    scale = std * ratio.std()
    r = np.divide(values.T @ ratio / n - mean * ratio.mean(), scale, out=np.zeros_like(scale), where=scale > 0)
    best = int(np.argmax(r))
    rows, acts = f.of_feature(best)
    order = np.argsort(acts, kind="stable")
    levels = [float(inside[rows[part]].mean()) for part in np.array_split(order, 5) if len(part)]
    upper = inside[rows[acts > acts.max() / 2]]
    return Proxy(kind, float(inside.mean()), best, float(r[best]), float(upper.mean()), levels)


def kinds_of_text(sample: Sample, blocks: Blocks, documents: Any, least: float) -> Iterator[tuple[str, Any]]:
    """The languages and kinds of document that make up at least this share of the sample, and at most half of it."""
    document = blocks.documents[sample.block, sample.offset]
    for column in ("language", "kind"):
        said = np.array(documents[column].to_pylist(), dtype=object)[document]
        for value in sorted({str(v) for v in said if v}):
            inside = said == value
            if least <= inside.mean() <= 0.5:
                yield f"{column} {value}", inside
