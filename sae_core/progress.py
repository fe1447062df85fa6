"""How long work tells of itself: one callback, so that the library needs no terminal and no tracker."""

from typing import Protocol, runtime_checkable


@runtime_checkable
class Report(Protocol):
    """Called often (cheaply) by every stage; whoever listens derives rate and time left."""

    def __call__(self, done: int, total: int, unit: str, **values: float) -> None:
        """`done` of `total` units (`tokens`, `features`) are finished; `values` are the newest numbers (`fvu`)."""


def silent(done: int, total: int, unit: str, **values: float) -> None:
    """The report that nobody reads."""
