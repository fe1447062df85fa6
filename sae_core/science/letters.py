"""First letters: does a feature of a letter fall silent on words that have a feature of their own (absorption)?

After Chanin et al. 2024 (arXiv 2409.14507) as SAEBench measures it, with these differences. Words are read where they
stand in the corpus, at the token that begins them, and not in a prompt that asks for the letter. One softmax probe
gives all letters. The main features of a letter are those whose firings, together, tell it best (F1), and not a
probe's. Half of the words make the probe and choose the features, the others are measured. SAEBench holds its measure
to be of no use below a billion parameters or 16,384 features: what small ones give is a lower bound at best.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.sparse import csc_matrix
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from sae_core.dictionary import Dictionary
from sae_core.science.firings import Firings, Sample

LETTERS = 26
PER_WORD = 10
"""Places of a word that are looked at, at most."""
LEAST_WORDS = 8
"""Words of a letter among those measured; one with fewer is left out."""
PROBE_F1 = 0.6
"""A letter that the probe tells less well says nothing (SAEBench)."""
SPLIT_GAIN, MOST_MAIN = 0.03, 10
"""A further main feature must add so much to the F1 (SAEBench); and there are so many at most."""
COSINE, SHARE = 0.1, 0.4
"""An absorbing feature's decoder row has at least this cosine with the probe, and adds at least this share of what the
activation has along it (SAEBench)."""
_PENALTY, _ITERATIONS = 1e-3, 60


class Words(NamedTuple):
    """Places in a sample where words begin."""

    rows: Int[np.ndarray, " n"]
    letter: Int[np.ndarray, " n"]
    measured: np.ndarray
    """Whether a place's word is none of those that the probe is made of."""


class Probe(NamedTuple):
    """What tells the letters."""

    direction: Float[np.ndarray, "letters d_model"]
    """Unit rows."""
    right: np.ndarray
    """Of each place whether the letter is told."""
    f1: Float[np.ndarray, " letters"]
    """On the words measured; NaN of a letter with too few."""


class Absorption(NamedTuple):
    """What one dictionary makes of first letters."""

    name: str
    letters: int
    """Letters that the probe tells."""
    f1: float
    """How well their main features tell them; the mean over these."""
    main: float
    """Main features of a letter, on average."""
    rate: float
    """Of the places that the probe tells, the share where no main feature fires, and another stands in for it."""
    places: int


def words(sample: Sample, strings: Sequence[str], seed: int = 0) -> Words:
    """Where tokens begin a word: a space and at least two ASCII letters."""
    begins = np.array([text[:1] == " " and len(text) > 2 and text.isascii() and text[1:].isalpha() for text in strings])
    first = np.array(
        [ord(text[1].lower()) - ord("a") if good else -1 for text, good in zip(strings, begins, strict=True)]
    )
    word_of: dict[str, int] = {}
    word = np.array([word_of.setdefault(text.lower(), len(word_of)) for text in strings])
    draw = np.random.default_rng(seed)
    order = draw.permutation(np.flatnonzero(begins[sample.token]))
    of = word[sample.token[order]]
    by_word = np.argsort(of, kind="stable")
    _, starts, counts = np.unique(of[by_word], return_index=True, return_counts=True)
    nth = np.arange(len(of)) - np.repeat(starts, counts)
    rows = np.sort(order[by_word[nth < PER_WORD]])
    is_measured = draw.random(len(word_of)) < 0.5
    return Words(rows, first[sample.token[rows]], is_measured[word[sample.token[rows]]])


def probe(x: Float[Tensor, "n d_model"], found: Words) -> Probe:
    """A softmax probe of the letters; `x` are the activations at the words' places."""
    x = x.float()
    learned = torch.from_numpy(~found.measured)
    y = torch.from_numpy(found.letter).long()
    mean, std = x[learned].mean(0), x[learned].std(0) + 1e-6
    z = (x - mean) / std
    W, b = torch.zeros(LETTERS, x.shape[1], requires_grad=True), torch.zeros(LETTERS, requires_grad=True)
    optimizer = torch.optim.LBFGS([W, b], max_iter=_ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        value = cross_entropy(z[learned] @ W.T + b, y[learned]) + _PENALTY * W.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    with torch.no_grad():
        told = (z @ W.T + b).argmax(1).numpy()
        direction = normalize((W - W.mean(0)) / std, dim=1).numpy()
    measured, f1 = found.measured, np.full(LETTERS, np.nan)
    for letter in range(LETTERS):
        own = measured & (found.letter == letter)
        if own.sum() >= LEAST_WORDS:
            f1[letter] = _f1((told == letter)[measured], (found.letter == letter)[measured])
    return Probe(direction, told == found.letter, f1)


def absorption(
    name: str, dictionary: Dictionary, firings: Firings, x: Float[Tensor, "n d_model"], found: Words, told: Probe
) -> Absorption:
    """How often a letter's features are silent and another one stands in; `firings` are on the whole sample."""
    acts = firings.values.tocsr()[found.rows]
    fires = (acts > 0).astype(np.float32).tocsc()
    cosine = dictionary.W_dec.numpy() @ told.direction.T
    along = (x.float() - x.float().mean(0)).numpy() @ told.direction.T
    f1, mains, absorbed, places = [], [], 0, 0
    letters = [int(letter) for letter in np.flatnonzero(told.f1 >= PROBE_F1)]
    for letter in letters:
        main = main_features(fires, found.letter == letter, ~found.measured)
        any_main = np.asarray(fires[:, main].sum(1)).ravel() > 0
        f1.append(_f1(any_main[found.measured], (found.letter == letter)[found.measured]))
        mains.append(len(main))
        asked = np.flatnonzero(found.measured & (found.letter == letter) & told.right)
        quiet = asked[~any_main[asked]]
        strong = np.where(cosine[:, letter] >= COSINE, cosine[:, letter], 0)
        most = acts[quiet].multiply(strong[None]).tocsr().max(1).toarray().ravel() if len(quiet) else np.zeros(0)
        absorbed += int(((most > 0) & (most >= SHARE * along[quiet, letter])).sum())
        places += len(asked)
    mean = [float(np.mean(each)) if each else 0.0 for each in (f1, mains)]
    return Absorption(name, len(letters), mean[0], mean[1], absorbed / max(places, 1), places)


def main_features(fires: csc_matrix, own: np.ndarray, learned: np.ndarray) -> list[int]:
    """The features whose firings together tell a letter best, one added after another while it helps."""
    some, y = fires[learned].astype(np.float64).tocsc(), own[learned].astype(np.float64)
    chosen, best, covered = list[int](), 0.0, np.zeros(len(y), bool)
    while len(chosen) < MOST_MAIN:
        left = (~covered).astype(np.float64)
        tp, n = (covered * y).sum() + some.T @ (left * y), covered.sum() + some.T @ left
        f1 = 2 * tp / np.maximum(n + y.sum(), 1)
        feature = int(np.argmax(f1))
        if chosen and f1[feature] < best + SPLIT_GAIN:
            break
        chosen, best = [*chosen, feature], float(f1[feature])
        covered |= some[:, [feature]].toarray().ravel() > 0
    return chosen


def _f1(said: np.ndarray, true: np.ndarray) -> float:
    return float(2 * (said & true).sum() / max(said.sum() + true.sum(), 1))
