"""Progress as lines of a log, by a clock that the test sets."""

from collections.abc import Callable

import pytest

from sae_core.progress import now_and_then


@pytest.fixture
def at(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Sets the clock."""

    def put(seconds: float) -> None:
        monkeypatch.setattr("time.monotonic", lambda: seconds)

    put(100.0)
    return put


def test_a_line_tells_how_far_how_fast_and_how_long_still(at: Callable[[float], None]):
    lines: list[str] = []
    report = now_and_then(lines.append, 10.0)
    for second, done in ((104, 400), (110, 1000), (112, 1100), (120, 4000)):  # the third too soon after the second
        at(float(second))
        report(done, 4000, "tokens", fvu=0.25)
    assert lines == [
        "1,000 of 4,000 tokens, 100 a second, 30 s left, fvu 0.25",
        "4,000 of 4,000 tokens, 225 a second, 0 s left, fvu 0.25",
    ]


def test_each_step_and_what_a_killed_run_had_done_has_a_rate_of_its_own(at: Callable[[float], None]):
    lines: list[str] = []
    report = now_and_then(lines.append, 10.0)
    report(0, 50, "batches")
    for second, done in ((1000, 700), (1005, 750)):  # gone on with at 700
        at(float(second))
        report(done, 800, "tokens")
    assert lines == ["750 of 800 tokens, 10 a second, 5 s left"]
