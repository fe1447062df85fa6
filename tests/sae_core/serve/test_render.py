"""How tokens and numbers are shown."""

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sae_core.artifacts import file_sha256
from sae_core.display import shown_bytes
from sae_core.serve import render
from sae_core.serve.render import STEPS, Piece, bars, found_in, number, percent, pieces, step, token


def shown(tokens: list[str], acts: list[float] | None = None) -> str:
    return "".join(piece.text for piece in pieces(tokens, acts or [0.0] * len(tokens), 1.0))


def test_plain_tokens_are_one_piece_and_firing_ones_stand_alone_without_their_space():
    assert list(pieces(["The", " old", " bridge", "."], [0.0, 0.0, 0.55, 0.0], 1.0)) == [
        Piece("The old ", 0, ""), Piece("bridge", 6, "0.550"), Piece(".", 0, ""),
    ]  # fmt: skip


def test_characters_that_tokens_cut_are_put_together():
    tokens = ["во\\xd0", "\\xb6", "дя"]
    assert shown(tokens) == "вождя"
    assert list(pieces(tokens, [0.0, 0.5, 0.0], 1.0)) == [
        Piece("во", 0, ""),
        Piece("ж", 5, "0.500"),
        Piece("дя", 0, ""),
    ]
    assert list(pieces(["\\xe6", "\\x97", "\\xa5"], [0.1, 0.0, 0.3], 1.0)) == [Piece("日", 3, "0.100, 0, 0.300")]


def test_bytes_that_make_no_character_are_shown_by_their_codes():
    assert shown(["\\xb7", "дам"]) == "‹b7›дам"
    assert shown(["a", "\\xe6\\x97"]) == "a‹e6 97›"
    assert shown(["\\xff\\xfe"]) == "‹ff›‹fe›"
    assert [piece.is_bytes for piece in pieces(["\\xb7"], [1.0], 1.0)] == [True]


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Cs", "Cc"], exclude_characters="\\⏎⇥‹"), max_size=20), st.data())
def test_any_text_cut_anywhere_is_shown_whole(text: str, data: st.DataObject):
    raw, tokens, start = text.encode(), [], 0
    while start < len(raw):
        stop = data.draw(st.integers(start + 1, len(raw)))
        tokens.append(raw[start:stop].decode("utf-8", "backslashreplace"))
        start = stop
    assert shown(tokens) == text
    assert b"".join(map(shown_bytes, tokens)) == raw


def test_line_breaks_tabs_and_control_characters_can_be_seen():
    assert shown(["a\n", "\tb\0"]) == "a⏎⇥b␀"
    assert token(" the") == "␣the"
    assert token("\n") == "⏎"


@settings(deadline=None)
@given(st.floats(0, 100, allow_nan=False), st.floats(0.1, 100))
def test_shades_rise_with_the_activation_and_only_nothing_has_none(act: float, maximum: float):
    assert (step(act, maximum) == 0) == (act == 0)
    assert step(act, maximum) <= step(act + 1, maximum) <= STEPS
    assert step(maximum, maximum) == STEPS


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (50.0, "50.0"), (0.12345, "0.123"), (0.000123, "0.000123"), (1234.5, "1,234"), (-1.5, "-1.50"),
     (None, "–"), (float("nan"), "–"), (1e-30, "0.000000")],
)  # fmt: skip
def test_numbers_have_three_significant_digits(value: float | None, text: str):
    assert number(value) == text


def test_shares_are_per_cent():
    assert percent(0.00513) == "0.513 %"


def test_bars_of_a_histogram_stand_side_by_side_and_reach_up_to_the_tallest():
    found = bars([4, 0, 1], 3.0)
    assert [(bar.x, bar.height) for bar in found] == [(0, 1), (pytest.approx(1 / 3), 0), (pytest.approx(2 / 3), 0.25)]
    assert found[2].step == STEPS
    assert found[0].told == "0 to 1.00: 4 firings"
    assert bars([0, 0], 0.0)[0].height == 0


def test_words_of_a_query_are_found_in_any_case_and_patterns_are_plain():
    assert found_in("Old bridge (b.", "BRIDGE (b") == [
        ("Old ", False),
        ("bridge", True),
        (" ", False),
        ("(b", True),
        (".", False),
    ]
    assert found_in("text", " ") == [("text", False)]


def test_vendored_javascript_is_what_its_list_says():
    folder = Path(render.__file__).parent / "static" / "vendor"
    listed = dict(re.findall(r"^\| (\S+\.js) .* ([0-9a-f]{64}) \|$", (folder / "README.md").read_text("utf-8"), re.M))
    assert listed == {file.name: file_sha256(file) for file in folder.glob("*.js")}
    assert listed
