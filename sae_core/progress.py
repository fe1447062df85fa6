"""How long work tells of itself: one callback, so that the library needs no terminal and no tracker."""

import time
from collections.abc import Callable
from typing import Protocol, runtime_checkable


@runtime_checkable
class Report(Protocol):
    """Called often (cheaply) by every stage; whoever listens derives rate and time left."""

    def __call__(self, done: int, total: int, unit: str, **values: float) -> None:
        """`done` of `total` units (`tokens`, `features`) are finished; `values` are the newest numbers (`fvu`)."""


def silent(done: int, total: int, unit: str, **values: float) -> None:
    """The report that nobody reads."""


def now_and_then(tell: Callable[[str], object], seconds: float) -> Report:
    """A report that tells a line, for logs: how far, how fast, and how long still; at most every so many seconds.

    Each step of the work, known by its total and unit, has a rate of its own; what was done before it began to tell has
    no part in that.
    """
    last = start = time.monotonic()
    step, begun = (0, ""), 0

    def report(done: int, total: int, unit: str, **values: float) -> None:
        nonlocal last, start, step, begun
        now = time.monotonic()
        if step != (total, unit):
            step, start, begun = (total, unit), now, done
        if now - last >= seconds and done > begun and now > start:
            last, rate = now, (done - begun) / (now - start)
            numbers = "".join(f", {name} {value:.4g}" for name, value in values.items())
            tell(f"{done:,} of {total:,} {unit}, {rate:,.0f} a second, {(total - done) / rate:.0f} s left{numbers}")

    return report
