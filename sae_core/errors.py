"""The one family of errors that a user can act on."""


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
        seen.append(error)
        error = error.__cause__ or error.__context__
    return ""
