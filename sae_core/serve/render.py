"""Templates, and how tokens and numbers are shown. Everything is escaped: templates hold the only markup."""

import codecs
import math
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

from fastapi import Request
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from starlette.responses import HTMLResponse

from sae_core.display import shown_bytes
from sae_core.labels.reader import doubted

STEPS = 10
"""Shades of the activation scale above nothing (classes `a1` to `a10` of the style sheet)."""

_SHOWN = re.compile("‹[0-9a-f]{2}›")
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


def pieces(tokens: Sequence[str], acts: Sequence[float], maximum: float, *, trim: bool = False) -> Iterator[Piece]:
    """Tokens as a person reads them: characters that tokens cut are whole, plain stretches in one, spaces unshaded.

    A character stands with the token that ends it, in the shade of the largest activation of the tokens it is all of.
    `trim` drops the space before the first of them.
    """
    plain = ""
    if trim and tokens and tokens[0].startswith(" "):
        tokens = [tokens[0][1:], *tokens[1:]]
    for text, values, is_bytes in _characters(tokens, acts):
        if max(values) <= 0 and not is_bytes:
            plain += text
            continue
        if text.startswith(" ") and len(text) > 1:
            plain, text = plain + " ", text[1:]
        if plain:
            yield Piece(plain, 0, "")
            plain = ""
        shade = step(max(values), maximum)
        yield Piece(text, shade, ", ".join(number(value) for value in values) if shade else "", is_bytes)
    if plain:
        yield Piece(plain, 0, "")


def _characters(tokens: Sequence[str], acts: Sequence[float]) -> Iterator[tuple[str, list[float], bool]]:
    """Whole characters, the activations of the tokens they come from, and whether they are bytes that make none."""
    rest = b""
    values: list[float] = []
    for string, act in zip(tokens, acts, strict=True):
        if not rest and string.isascii() and string.isprintable() and "\\" not in string:  # most are: nothing to do
            yield string, [act], False
            continue
        raw, values = rest + shown_bytes(string), [*values, act]
        whole = _whole(raw)
        text, rest = raw[:whole].decode("utf-8", "mind_atlas_bytes"), raw[whole:]
        if text:
            yield visible(text), values, _SHOWN.search(text) is not None
            values = []
    if rest:
        yield rest.decode("utf-8", "mind_atlas_bytes"), values or [0.0], True


def _whole(raw: bytes) -> int:
    """How many bytes there are before a last character that is not complete."""
    for back in range(1, min(4, len(raw) + 1)):
        lead = raw[-back]
        if lead >= 0xC0:
            width = 2 if lead < 0xE0 else 3 if lead < 0xF0 else 4
            return len(raw) - back if width > back else len(raw)
        if lead < 0x80:
            break
    return len(raw)


def _byte_codes(error: UnicodeError) -> tuple[str, int]:
    """Bytes that are no character, by their codes."""
    assert isinstance(error, UnicodeDecodeError)
    return f"‹{error.object[error.start : error.end].hex(' ')}›", error.end


codecs.register_error("mind_atlas_bytes", _byte_codes)


def visible(text: str) -> str:
    """Line breaks as ⏎, tabs as ⇥, and control characters as their pictures, so that each token can be seen."""
    return text.replace("\n", "⏎").replace("\t", "⇥").translate(_CONTROLS)


def broken(text: str) -> str:
    """`visible` text with its lines broken after the sign of it."""
    return text.replace("⏎", "⏎\n")


def token(text: str) -> str:
    """A token by itself, its leading space shown."""
    shown = "".join(piece.text for piece in pieces([text], [0.0], 0.0))
    return "␣" + shown[1:] if shown.startswith(" ") else shown


def found_in(text: str, query: str) -> list[tuple[str, bool]]:
    """A text in parts, and which of them are words of the query."""
    words = sorted(map(re.escape, query.split()), key=len, reverse=True)
    parts = re.split(f"({'|'.join(words)})", text, flags=re.IGNORECASE) if words else [text]
    return [(part, i % 2 == 1) for i, part in enumerate(parts) if part]


def number(value: float | None) -> str:
    """Three significant digits, thousands parted."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0 or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.{min(2 - math.floor(math.log10(abs(value))), 6)}f}"


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
_TEMPLATES.filters |= {"number": number, "percent": percent, "token": token, "visible": visible, "broken": broken}
_TEMPLATES.globals |= {
    "pieces": pieces,
    "found_in": found_in,
    "bars": bars,
    "step": step,
    "feature_path": feature_path,
    "doubted": doubted,
}


def page(request: Request, template: str, *, status: int = 200, **values: Any) -> HTMLResponse:
    """A page made of a template; `dictionary` of the values says which one the navigation stays with."""
    shelf = request.app.state.shelf
    values["static"] = getattr(request.app.state, "static", False)  # for a site of files: nothing that needs a server
    chosen = values.setdefault("dictionary", "")
    values["reports"] = shelf.reports(chosen)
    values["circuits"] = shelf.has_circuits
    values["can_label"] = request.app.state.labeling.command is not None
    asked = request.query_params.get("dictionary", "")
    values["stay"] = f"?dictionary={quote(chosen)}" if chosen and (asked or chosen != shelf.default) else ""
    return HTMLResponse(_TEMPLATES.get_template(template).render(path=request.url.path, **values), status)
