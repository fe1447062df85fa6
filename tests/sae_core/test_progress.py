"""Progress as lines of a log, by a clock that the test sets."""

import pytest

from sae_core.progress import now_and_then


def test_a_line_tells_how_far_how_fast_and_how_long_still(monkeypatch: pytest.MonkeyPatch):
    clock = iter([100.0, 104.0, 110.0, 112.0, 120.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    lines: list[str] = []
    report = now_and_then(lines.append, 10.0)
    report(400, 4000, "tokens")  # too early
    report(1000, 4000, "tokens", fvu=0.25)
    report(1100, 4000, "tokens")  # too soon after
    report(4000, 4000, "tokens")
    assert lines == [
        "1,000 of 4,000 tokens, 100 a second, 30 s left, fvu 0.25", "4,000 of 4,000 tokens, 200 a second, 0 s left",
    ]  # fmt: skip


def test_nothing_done_is_no_rate(monkeypatch: pytest.MonkeyPatch):
    clock = iter([0.0, 50.0])
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    now_and_then(lambda line: pytest.fail(line), 10.0)(0, 10, "tokens")
