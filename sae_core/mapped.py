"""Files that are mapped into memory."""

from collections.abc import Iterable
from pathlib import Path


def read_through(paths: Iterable[Path]) -> None:
    """Read files from end to end, so that their pages are in memory when somebody asks for one.

    Else whoever asks first waits for the disk at every page, and everybody else with him: Python's lock is held.
    """
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass
