"""Templates, and how tokens and numbers are shown. Everything is escaped: templates hold the only markup."""

import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from fastapi import Request
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.responses import HTMLResponse

STEPS = 10
"""Shades of the activation scale above nothing (classes `a1` to `a10` of the style sheet)."""

_FRAGMENT = re.compile(r" ?(?:\\x[0-9a-f]{2})+")
_CONTROLS = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"} | {0x7F: "\u2421"}


class Piece(NamedTuple):
    """A stretch of text shown in one shade."""

    text: str
    step: int
    """0 (nothing) to `STEPS` (the feature's maximum)."""
    value: str
    """The exact activation; empty where there is none."""
    is_bytes: bool = False
    """Bytes that are no whole character, shown by their codes."""


class Bar(NamedTuple):
    """A bar of a histogram of activations."""

    x: float
    height: float
    """Share of the tallest bar."""
    step: int
    told: str


def step(act: float, maximum: float) -> int:
    """The shade of an activation: equal steps of (0, maximum], closed above."""
    return min(STEPS, max(1, math.ceil(STEPS * act / maximum))) if act > 0 and maximum > 0 else 0


def pieces(tokens: Sequence[str], acts: Sequence[float], maximum: float) -> Iterator[Piece]:
    """Tokens as a person reads them: bytes joined into characters where they make some, plain stretches in one.

    A character whose bytes are several tokens is shaded by the largest of their activations.
    """
    plain = ""
    for strings, values in _joined(tokens, acts):
        text, whole = _characters(strings)
        act = max(values)
        if act <= 0 and whole:
            plain += text
            continue
        if plain:
            yield Piece(plain, 0, "")
            plain = ""
        told = ", ".join(number(value) for value in values)
        yield Piece(text, step(act, maximum), told if act > 0 else "", not whole)
    if plain:
        yield Piece(plain, 0, "")


def _joined(tokens: Sequence[str], acts: Sequence[float]) -> Iterator[tuple[list[str], list[float]]]:
    """Runs of byte fragments together, every other token alone."""
    strings: list[str] = []
    values: list[float] = []
    for token, act in zip(tokens, acts, strict=True):
        fragment = _FRAGMENT.fullmatch(token) is not None
        if strings and (not fragment or token.startswith(" ")):
            yield strings, values
            strings, values = [], []
        if fragment:
            strings, values = [*strings, token], [*values, act]
        else:
            yield [token], [act]
    if strings:
        yield strings, values


def _characters(strings: list[str]) -> tuple[str, bool]:
    """The text of a run of tokens, and whether it is whole characters."""
    text = "".join(strings)
    if not _FRAGMENT.fullmatch(strings[0]):
        return visible(text), True
    lead = " " if text.startswith(" ") else ""
    raw = bytes.fromhex(text.strip().replace("\\x", ""))
    try:
        return lead + visible(raw.decode()), True
    except UnicodeDecodeError:
        return f"{lead}‹{raw.hex(' ')}›", False


def visible(text: str) -> str:
    """Line breaks as ⏎, tabs as ⇥, and control characters as their pictures, so that each token can be seen."""
    return text.replace("\n", "⏎").replace("\t", "⇥").translate(_CONTROLS)


def lines(text: str) -> str:
    """As `visible`, with the lines still broken."""
    return visible(text).replace("⏎", "⏎\n")


def token(text: str) -> str:
    """A token by itself, its leading space shown."""
    shown = "".join(piece.text for piece in pieces([text], [0.0], 0.0))
    return "␣" + shown[1:] if shown.startswith(" ") else shown


def number(value: float | None) -> str:
    """Three significant digits, thousands parted."""
    if value is None or not math.isfinite(value):
        return "–"
    if abs(value) >= 1000 or value == int(value):
        return f"{value:,.0f}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(digits, 6)}f}"


def percent(share: float | None) -> str:
    """A share as per cent, three significant digits."""
    return "–" if share is None else f"{number(100 * share)} %"


def bars(histogram: Sequence[int], maximum: float) -> list[Bar]:
    """The bars of a feature's histogram; each in the shade of its activations."""
    tallest, width = max(histogram, default=0) or 1, maximum / max(len(histogram), 1)
    return [
        Bar(
            i / len(histogram), count / tallest, step(width * (i + 1), maximum),
            f"{number(width * i)} to {number(width * (i + 1))}: {count:,} firings",
        )
        for i, count in enumerate(histogram)
    ]  # fmt: skip


def feature_path(dictionary: str, feature: int) -> str:
    """The address of a feature's page."""
    return f"/f/{quote(dictionary, safe='')}/{feature}"


_TEMPLATES = Environment(
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
_TEMPLATES.filters |= {"number": number, "percent": percent, "token": token, "visible": visible, "lines": lines}
_TEMPLATES.globals |= {"pieces": pieces, "bars": bars, "step": step, "feature_path": feature_path}


def page(request: Request, template: str, *, status: int = 200, **values: Any) -> HTMLResponse:
    """A page made of a template; `dictionary` of the values says which one the navigation stays with."""
    shelf = request.app.state.shelf
    chosen = values.setdefault("dictionary", "")
    asked = request.query_params.get("dictionary", "")
    values["stay"] = f"?dictionary={quote(chosen)}" if chosen and (asked or chosen != shelf.default) else ""
    values["has_map"] = any(getattr(route, "path", "") == "/map" for route in request.app.routes)
    return HTMLResponse(_TEMPLATES.get_template(template).render(path=request.url.path, **values), status)
