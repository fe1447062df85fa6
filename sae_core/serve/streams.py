"""Streams of tokens on their way to a client, which may go away at any time."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any, TypeVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from sae_core.errors import MindAtlasError
from sae_core.serve.live import LiveError
from sae_core.serve.turns import Stream
from sae_core.steers import Method, Steer

T = TypeVar("T")

_LOOK = 0.1  # seconds between two looks whether anyone still waits for an answer


class SteerField(BaseModel):
    """What is done to one feature, as requests say it."""

    model_config = ConfigDict(extra="forbid")
    feature: int
    strength: float
    method: Method = "clamp"

    @property
    def steer(self) -> Steer:
        return Steer(self.feature, self.strength, self.method)


def event(data: dict[str, Any]) -> str:
    """A server-sent event."""
    return f"data: {json.dumps(data, ensure_ascii=False)}\n\n"


async def next_item(request: Request, items: Stream[T]) -> T | None:
    """The next item, None after the last; raises LiveError when the client went away meanwhile."""
    waiting = asyncio.ensure_future(anext(items, None))
    try:
        while True:
            done, _ = await asyncio.wait({waiting}, timeout=_LOOK)
            if await request.is_disconnected():
                raise LiveError("nobody waits for the answer any more", 499)
            if done:
                return waiting.result()
    finally:
        waiting.cancel()


async def in_time(request: Request, items: Stream[T], seconds: float) -> AsyncIterator[T]:
    """The items that are there within `seconds`; raises LiveError when the time is up or the client went away."""
    end = asyncio.get_running_loop().time() + seconds
    while True:
        try:
            async with asyncio.timeout_at(end):
                item = await next_item(request, items)
        except TimeoutError:
            raise _too_slow(seconds) from None
        if item is None:
            return
        yield item


def _too_slow(seconds: float) -> LiveError:
    return LiveError(f"no answer within {seconds:g} s: try again, or ask for less", 504)


async def event_stream(
    request: Request, items: Stream[dict[str, Any]], seconds: float | None = None
) -> "EventStream":  # fmt: skip
    """An answer whose events are the items, each waited for so long at most; an event `error` ends what cannot go on.

    Raises LiveError when there is no first one in time, the client went away meanwhile, or, as a bad request, what was
    sent is wrong.
    """
    try:
        async with asyncio.timeout(seconds):
            first = await next_item(request, items)
    except BaseException as error:
        items.close()
        if isinstance(error, TimeoutError):
            raise _too_slow(seconds or 0) from None
        if isinstance(error, MindAtlasError) and not isinstance(error, LiveError):
            raise LiveError(str(error), 400) from None
        raise
    return EventStream(_events(first or {}, items, seconds), items)


async def _events(
    first: dict[str, Any], items: Stream[dict[str, Any]], seconds: float | None
) -> AsyncIterator[str]:  # fmt: skip
    item: dict[str, Any] | None = first
    try:
        while item is not None:
            yield event(item)
            try:
                async with asyncio.timeout(seconds):
                    item = await anext(items, None)
            except TimeoutError:
                raise _too_slow(seconds or 0) from None
    except MindAtlasError as error:
        yield event({"error": str(error)})


class EventStream(StreamingResponse):
    """Events that are made from a stream. It is closed in any case: also when no byte could be sent."""

    def __init__(
        self, events: AsyncIterator[str], made_from: Stream[Any], media_type: str = "text/event-stream"
    ) -> None:
        super().__init__(events, media_type=media_type, headers={"Cache-Control": "no-store"})
        self._made_from = made_from

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._made_from.close()
