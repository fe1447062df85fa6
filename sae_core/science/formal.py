"""Features of text whose meaning is formal: digits, DNA, base64.

What such text is, is said by a pattern; how likely it is, by its alphabet: each character of it alike, any other one in
1e-10 (Bricken et al. 2023). Their DNA proxy wants two tokens at least; here the pattern wants `DNA_LEAST` characters.
"""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Bool, Float

from sae_core.corpus.packing import Blocks
from sae_core.science.coverage import Proxy, best_run, proxy
from sae_core.science.firings import Firings, Sample

FOREIGN = 1e-10
"""Probability of a character that is none of the alphabet."""
DNA_LEAST, BASE64_LEAST = 12, 24
"""Characters in a row from which on letters are taken for such."""
LEAST_TOKENS = 50
"""With fewer there is nothing to tell."""
_BYTE = re.compile(r"\\x[0-9a-f]{2}")
"""What the display makes of a byte that is no whole character."""


class Kind(NamedTuple):
    """A kind of text."""

    name: str
    pattern: str
    alphabet: str
    paper: str
    """What Bricken et al. found."""


_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
_MIXED = r"(?=[A-Za-z+/]*\d)(?=[A-Z0-9+/]*[a-z])(?=[a-z0-9+/]*[A-Z])"
KINDS = (
    Kind("digits", r"[0-9]+", "0123456789", "not measured"),
    Kind("DNA", rf"(?<![A-Za-z])[ACGT]{{{DNA_LEAST},}}(?![A-Za-z])", "ACGT", "r 0.8"),
    Kind(
        "base64", rf"(?<![\w+/]){_MIXED}[A-Za-z0-9+/]{{{BASE64_LEAST},}}=*", _LETTERS + "0123456789+/", "r 0.38"
    ),
)  # fmt: skip


class Found(NamedTuple):
    """What is found of a kind."""

    kind: Kind
    tokens: int
    features: Proxy | None
    """None where there are too few tokens."""
    random: Proxy | None
    """Of random directions."""


def formal_kinds(
    sample: Sample, blocks: Blocks, strings: Sequence[str], features: Firings, random: Firings
) -> Iterator[Found]:
    """Each kind, and the feature that follows it best; `strings` is the text of each token id."""
    for kind in KINDS:
        inside = standing_in(kind.pattern, sample, blocks, strings)
        n = int(inside.sum())
        if n < LEAST_TOKENS:
            yield Found(kind, n, None, None)
            continue
        ratio = best_run(token_ratio(kind.alphabet, sample, strings), sample, blocks)
        yield Found(kind, n, *(proxy(kind.name, inside, ratio, one) for one in (features, random)))


def token_ratio(alphabet: str, sample: Sample, strings: Sequence[str]) -> Float[np.ndarray, " vocab"]:
    """log P(token | kind) / P(token): the former by its characters, the latter by how often it is in the sample."""
    counts = np.bincount(sample.token, minlength=len(strings)) + 0.5
    own, foreign = -np.log(len(alphabet)), np.log(FOREIGN)
    kind = [sum(own if character in alphabet else foreign for character in text) for text in strings]
    return np.array(kind) - np.log(counts / counts.sum())


def standing_in(pattern: str, sample: Sample, blocks: Blocks, strings: Sequence[str]) -> Bool[np.ndarray, " tokens"]:
    """The tokens all of whose characters, spaces apart, lie in what a pattern matches in their block."""
    inside = np.zeros(blocks.token_ids.shape, bool)
    for block in np.unique(sample.block):
        texts = [_BYTE.sub("\0", strings[token]) for token in blocks.token_ids[block]]
        whole = "".join(texts)
        matched = np.array([character.isspace() for character in whole], bool)
        blank = matched.copy()
        for match in re.finditer(pattern, whole):
            matched[match.start() : match.end()] = True
        ends = np.cumsum([len(text) for text in texts])
        for place, (end, text) in enumerate(zip(ends, texts, strict=True)):
            here = slice(end - len(text), end)
            inside[block, place] = bool(text) and matched[here].all() and not blank[here].all()
    return inside[sample.block, sample.offset]
