"""Text that is easier made than found. Each generator yields an endless stream of (group, text) from a seed.

Texts of one group say nearly the same, so statistics count the group, not the text. A study plants such text in its
corpus by the source `made:` and a generator's name.
"""

import base64
from collections.abc import Callable, Iterator
from itertools import count, islice

import numpy as np

Made = Iterator[tuple[str, str]]

_SURNAMES = (
    "Abbott", "Bianchi", "Castellanos", "Dvorak", "Eriksson", "Fitzgerald", "Gutierrez", "Hashimoto", "Ivanov",
    "Jankowski", "Kowalski", "Lindqvist", "Moreau", "Nakamura", "Okafor", "Petrov", "Quinn", "Rossi", "Schneider",
    "Takahashi", "Ulrich", "Vasquez", "Whitfield", "Yamamoto", "Zielinski", "Andersen", "Bergmann", "Chowdhury",
    "Delacroix", "Engstrom", "Fujimoto", "Goldberg", "Hargreaves", "Johansson", "Kaufmann", "Lombardi", "Mendoza",
    "Novak", "Oliveira", "Pfeiffer",
)  # fmt: skip
_PLACES = (
    "Lisbon", "Oslo", "Nairobi", "Lima", "Quebec", "Madrid", "Cairo", "Athens", "Dublin", "Warsaw", "Jakarta",
    "Hanoi", "Ankara", "Vienna", "Prague", "Tunis", "Bogota", "Manila", "Havana", "Seoul", "Delhi", "Kyoto",
    "Bergen", "Geneva", "Bristol", "Dakar", "Riga", "Zagreb", "Sofia", "Tbilisi",
)  # fmt: skip
_FINDINGS = (
    "The effect was first described in small samples", "Later studies found the same pattern",
    "This agrees with earlier measurements", "The method has been used in many fields",
    "Results of this kind are rarely replicated", "The same survey was repeated ten years on",
    "Most of the variance remained unexplained", "A similar instrument was built at that time",
    "The population had declined by a third", "No difference was seen between the groups",
)  # fmt: skip
_NAMES = (
    "total", "items", "value", "count", "result", "prices", "width", "height", "index", "limit", "words", "lines",
    "rows", "score", "weight",
)  # fmt: skip
_SNIPPETS = (
    ("def {f}({a}, {b}):\n    {c} = {a} + {b}\n    return {c}\n", "return {c}", "return {c}s_"),
    ("def {f}({a}):\n    for x in {a}:\n        print(x)\n", "in {a}:", "in {a}"),
    ("{a} = [1, 2, 3]\nprint({a}[{n} % 3])\n", "[{n} % 3]", "[{n} + 3]"),
    ("{a} = {n}\nprint('{a} is ' + str({a}))\n", "str({a})", "{a}"),
    ("{a} = {{'{b}': {n}}}\nprint({a}['{b}'])\n", "print({a}['{b}'])", "print({a}['{b}']"),
    ("def {f}({a}):\n    if {a} == 0:\n        return 0\n    return {n} / {a}\n", "{n} / {a}", "{n} / 0"),
    ("{a} = {n}\nwhile {a} > 0:\n    {a} = {a} - 1\n", "{a} = {a} - 1", "{a} = {b} - 1"),
    ("import math\n{a} = math.sqrt({n})\nprint({a})\n", "math.sqrt", "maths.sqrt"),
)
"""Python, what in it is replaced, and by what: afterwards it does not run."""


def dna(rng: np.random.Generator) -> Made:
    """Strands of random bases."""
    return ((f"dna {i}", "".join(rng.choice(list("ACGT"), rng.integers(50, 90)))) for i in count())


def base64_text(rng: np.random.Generator) -> Made:
    """Random bytes in base64."""
    return ((f"base64 {i}", base64.b64encode(rng.bytes(int(rng.integers(40, 70)))).decode()) for i in count())


def hexadecimal(rng: np.random.Generator) -> Made:
    """Random bytes in hexadecimal digits."""
    return ((f"hex {i}", rng.bytes(int(rng.integers(20, 40))).hex()) for i in count())


def letters(rng: np.random.Generator) -> Made:
    """Random capital letters of the whole alphabet."""
    return ((f"letters {i}", "".join(rng.choice(list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"), 60))) for i in count())


def digits(rng: np.random.Generator) -> Made:
    """Rows of numbers of one to six digits."""
    return ((f"digits {i}", " ".join(str(rng.integers(10 ** rng.integers(1, 7))) for _ in range(14))) for i in count())


def citations(rng: np.random.Generator) -> Made:
    """Sentences that end in a reference by surnames and year."""
    for _ in count():
        finding, year = rng.integers(len(_FINDINGS)), rng.integers(1960, 2021)
        first, second = rng.choice(_SURNAMES, 2, replace=False)
        by = (f"{first}, {year}", f"{first} & {second}, {year}", f"{first} et al., {year}")[rng.integers(3)]
        yield f"finding {finding}", f"{_FINDINGS[finding]} ({by})."


def places(rng: np.random.Generator) -> Made:
    """The same sentences, ending in places: no surnames, but capitals, commas and brackets."""
    for _ in count():
        finding = rng.integers(len(_FINDINGS))
        first, second = rng.choice(_PLACES, 2, replace=False)
        where = (f"in {first}", f"in {first} and {second}", f"{first}, summer")[rng.integers(3)]
        yield f"finding {finding}", f"{_FINDINGS[finding]} ({where})."


def buggy_code(rng: np.random.Generator) -> Made:
    """A few lines of Python with one slip by which they do not run."""
    return _code(rng, buggy=True)


def working_code(rng: np.random.Generator) -> Made:
    """The same lines without the slip."""
    return _code(rng, buggy=False)


def _code(rng: np.random.Generator, buggy: bool) -> Made:
    for _ in count():
        kind = int(rng.integers(len(_SNIPPETS)))
        code, good, bad = _SNIPPETS[kind]
        f, a, b, c = rng.choice(_NAMES, 4, replace=False)
        names = {"f": f"get_{f}", "a": a, "b": b, "c": c, "n": int(rng.integers(2, 100))}
        text = code.replace(good, bad) if buggy else code
        yield f"snippet {kind}", text.format(**names)


GENERATORS: dict[str, Callable[[np.random.Generator], Made]] = {
    maker.__name__: maker
    for maker in (dna, base64_text, hexadecimal, letters, digits, citations, places, buggy_code, working_code)
}
"""By name."""
PLANTED = "made:"
"""What the name of a corpus source begins with that a generator fills."""
_SEED, _DOCUMENTS, _LINES = 1, 1000, 8


def planted(source: str) -> Iterator[str]:
    """A thousand documents of eight texts each, from another seed than that of any prompt. `source`: `made:dna`."""
    stream = (text for _, text in GENERATORS[source.removeprefix(PLANTED)](np.random.default_rng(_SEED)))
    return ("\n".join(islice(stream, _LINES)) for _ in range(_DOCUMENTS))
