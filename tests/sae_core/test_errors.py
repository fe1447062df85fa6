"""The line for the user is found wherever in a chain of errors it is."""

import sqlite3
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sae_core.errors import MindAtlasError, message_of


def raised(act: Callable[[], object]) -> Exception:
    with pytest.raises(Exception, match=r"\w|^$") as caught:
        act()
    return caught.value


def wrapped(error: Exception) -> Exception:
    """As Dagster and SQLAlchemy pass on what they met."""
    try:
        raise RuntimeError("a step failed") from error
    except RuntimeError as outer:
        return outer


def full_disk() -> object:
    return Path("/dev/full").write_bytes(b"x")


def full_database() -> object:
    with sqlite3.connect(":memory:") as database:
        database.execute("PRAGMA max_page_count = 1")
        return database.execute("CREATE TABLE runs (id)")


def locked_database(path: Path) -> object:
    with sqlite3.connect(path, isolation_level=None) as held, sqlite3.connect(path, timeout=0) as other:
        held.execute("BEGIN EXCLUSIVE")
        return other.execute("CREATE TABLE runs (id)")


def read_only_database(path: Path) -> object:
    sqlite3.connect(path).close()
    return sqlite3.connect(f"file:{path}?mode=ro", uri=True).execute("CREATE TABLE runs (id)")


def test_an_error_for_the_user_is_found_behind_others() -> None:
    assert message_of(wrapped(wrapped(MindAtlasError("give a layer")))) == "give a layer"


def test_other_errors_have_no_line_not_even_in_a_circle() -> None:
    error = wrapped(KeyError("x"))
    assert error.__cause__ is not None
    error.__cause__.__cause__ = error
    assert message_of(error) == message_of(None) == ""
    assert message_of(FileNotFoundError(2, "No such file")) == message_of(sqlite3.Error("misuse")) == ""


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no full device")
def test_a_full_disk_is_said_with_the_cure() -> None:
    said = message_of(wrapped(raised(full_disk)))
    assert said.startswith("the disk is full: free some")


def test_what_a_database_cannot_do_is_said_with_the_cure(tmp_path: Path) -> None:
    assert "free some" in message_of(wrapped(raised(full_database)))
    assert "locked" in message_of(wrapped(raised(lambda: locked_database(tmp_path / "a.db"))))
    assert "make the folder writable" in message_of(wrapped(raised(lambda: read_only_database(tmp_path / "b.db"))))


@pytest.mark.parametrize("ask", [lambda: bytearray(1 << 62), lambda: torch.empty(1 << 60)])
def test_memory_that_is_used_up_is_said_with_the_cure(ask: Callable[[], object]) -> None:
    assert message_of(wrapped(raised(ask))).startswith("memory is used up: end other programs")
