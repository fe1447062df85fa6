"""The one family of errors that a user can act on."""

import errno
import sqlite3

_FULL = "the disk is full: free some, or set MIND_ATLAS_HOME elsewhere"
_READ_ONLY = "nothing can be written there: make the folder writable, or set MIND_ATLAS_HOME elsewhere"
_NO_MEMORY = "memory is used up: end other programs, or make the study smaller (d_sae, batch_tokens, the model)"
_OUT_OF_MEMORY = ("allocate memory", "out of memory")
"""How torch says so, on a CPU and on a GPU: in the text of a RuntimeError, and nowhere else."""
_BY_ERRNO = {errno.ENOSPC: _FULL, errno.EDQUOT: _FULL, errno.EROFS: _READ_ONLY, errno.ENOMEM: _NO_MEMORY}
_BY_SQLITE = {
    sqlite3.SQLITE_FULL: _FULL,
    sqlite3.SQLITE_NOMEM: _NO_MEMORY,
    sqlite3.SQLITE_IOERR: f"a database cannot be read or written, perhaps because {_FULL}",
    sqlite3.SQLITE_READONLY: _READ_ONLY,
    sqlite3.SQLITE_BUSY: "another process keeps Dagster's database of runs locked: wait for it, or end it",
}


class MindAtlasError(Exception):
    """Something a user can mend: the message is one line that says what was wrong, the value, and the cure.

    The command line prints the message and exits with status 1; a traceback is shown only with `--debug`.
    """

    passing = False
    """True when there is nothing to mend: the same may succeed some minutes later."""


def message_of(error: BaseException | None) -> str:
    """The line meant for the user, from the error or from what caused it; empty when there is none."""
    seen = []
    while error is not None and error not in seen:  # an exception may be its own cause, in a circle
        if isinstance(error, MindAtlasError):
            return str(error)
        if said := _of_the_machine(error):
            return said
        seen.append(error)
        error = error.__cause__ or error.__context__
    return ""


def _of_the_machine(error: BaseException) -> str:
    """What the system refused that a user can mend, wherever it was met; empty when it is nothing of the kind."""
    said_by_torch = isinstance(error, RuntimeError) and any(said in str(error) for said in _OUT_OF_MEMORY)
    if isinstance(error, MemoryError) or said_by_torch:
        return _NO_MEMORY
    if isinstance(error, OSError) and error.errno in _BY_ERRNO:
        return f"{_BY_ERRNO[error.errno]} ({error.filename})" if error.filename else _BY_ERRNO[error.errno]
    code = getattr(error, "sqlite_errorcode", None) if isinstance(error, sqlite3.Error) else None
    return _BY_SQLITE.get(code & 0xFF, "") if code is not None else ""  # the low byte; the rest says more than we ask
