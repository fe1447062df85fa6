"""The one family of errors that a user can act on."""


class MindAtlasError(Exception):
    """Something a user can mend: the message is one line that says what was wrong, the value, and the cure.

    The command line prints the message and exits with status 1; a traceback is shown only with `--debug`.
    """

    passing = False
    """True when there is nothing to mend: the same may succeed some minutes later."""
