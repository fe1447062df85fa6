"""When to ask a server again after a fault, and when to leave it alone altogether."""

import asyncio
import math
import random
import time
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime

import openai

RETRIES = 6
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 16.0
"""Seconds before a request is sent again: doubled from time to time, less a random share of at most a half."""
LONGEST_WAIT = 120.0
"""Seconds that are waited when the server asks for it; when it asks for more, the run ends."""
_AGAIN = {408, 409, 425, 429}


class Pace:
    """The pauses of all requests to one server: when it has too many from one, all of them wait."""

    def __init__(self) -> None:
        self._not_before = 0.0

    async def wait(self) -> None:
        """Until the server may be asked."""
        while (wait := self._not_before - time.monotonic()) > 0:
            await asyncio.sleep(wait * random.uniform(1, 1.05))  # not all in the same instant

    async def pause(self, error: Exception, turn: int) -> None:
        """After the fault of turn 0, 1, ...: as long as the server asks for, else ever longer."""
        seconds = asked_to_wait(error)
        if seconds is None:
            seconds = min(FIRST_PAUSE * 2**turn, LONGEST_PAUSE) * random.uniform(0.5, 1)
        if isinstance(error, openai.RateLimitError):
            self._not_before = max(self._not_before, time.monotonic() + seconds)
        await asyncio.sleep(seconds)


def is_passing(error: Exception) -> bool:
    """Whether the same request may succeed a little later: time-outs, dropped connections, 408, 409, 425, 429, 5xx.

    Not when the account's quota is used up, nor when the server asks to wait for longer than `LONGEST_WAIT`.
    """
    if not isinstance(error, openai.APIStatusError):
        return isinstance(error, openai.APIConnectionError)
    is_short = (asked_to_wait(error) or 0) <= LONGEST_WAIT and error.code != "insufficient_quota"
    return is_short and (error.status_code in _AGAIN or error.status_code >= 500)


def asked_to_wait(error: Exception) -> float | None:
    """Seconds that the answer's `Retry-After` (RFC 9110: seconds, or a date) asks for; None when it does not."""
    if not isinstance(error, openai.APIStatusError):
        return None
    text = error.response.headers.get("retry-after", "")
    try:
        seconds = float(text)
    except ValueError:
        try:
            date = parsedate_to_datetime(text)
        except ValueError:
            return None
        seconds = (date.replace(tzinfo=date.tzinfo or UTC) - datetime.now(UTC)).total_seconds()
    return seconds if math.isfinite(seconds) and seconds > 0 else None
