"""The bounds of the live model: text, time, requests at once, and clients that go away."""

import asyncio
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import Request

from sae_core.atlas import Atlas, ExplainedToken
from sae_core.serve.live import MAX_CHARACTERS, Live, LiveError
from sae_core.studies import Studies


class Client(Request):
    """A client that goes away when told."""

    def __init__(self, gone: bool = False) -> None:
        self.gone = gone

    async def is_disconnected(self) -> bool:
        return self.gone


class Slow(Atlas):
    """An atlas that reads a token each hundredth of a second, and says how far it came."""

    dictionary = "slow"

    def __init__(self, tokens: int) -> None:
        self.tokens, self.read, self.started = tokens, 0, threading.Event()

    def explain_lazily(self, *_: Any) -> Iterator[ExplainedToken]:
        self.started.set()
        for _i in range(self.tokens):
            time.sleep(0.01)
            self.read += 1
            yield ExplainedToken("a", [])


def live(**bounds: Any) -> Live:
    made = Live(Studies([]), **bounds)
    made._model = lambda atlas: SimpleNamespace()  # type: ignore[method-assign, assignment, return-value]
    return made


def explain(live: Live, atlas: Any, request: Any, text: str = "a") -> Any:
    return live.explain(request, atlas, text, 1)


def test_a_client_that_goes_away_frees_its_place_and_ends_the_work():
    async def run() -> None:
        model, atlas, request = live(places=1), Slow(10_000), Client()
        work = asyncio.ensure_future(explain(model, atlas, request))
        await asyncio.to_thread(atlas.started.wait, 10)
        with pytest.raises(LiveError, match="busy"):
            await explain(model, atlas, Client())
        request.gone = True
        with pytest.raises(LiveError, match="nobody waits"):
            await work
        assert len(await explain(model, Slow(3), Client())) == 3
        assert atlas.read < 1000

    asyncio.run(run())


def test_work_that_takes_too_long_is_ended():
    async def run() -> None:
        model, atlas = live(seconds=0.2), Slow(10_000)
        with pytest.raises(LiveError, match="shorter text") as error:
            await explain(model, atlas, Client())
        assert error.value.status == 504
        assert len(await explain(model, Slow(2), Client())) == 2
        assert atlas.read < 1000

    asyncio.run(run())


def test_a_cancelled_request_frees_its_place():
    async def run() -> None:
        model, atlas = live(places=1), Slow(10_000)
        work = asyncio.ensure_future(explain(model, atlas, Client()))
        await asyncio.to_thread(atlas.started.wait, 10)
        work.cancel()
        with pytest.raises(asyncio.CancelledError):
            await work
        assert len(await explain(model, Slow(1), Client())) == 1

    asyncio.run(run())


def test_texts_wait_for_one_another_and_all_are_answered():
    async def run() -> None:
        model = live(places=3)
        found = await asyncio.gather(*(explain(model, Slow(n), Client()) for n in (5, 1, 3)))
        assert [len(tokens) for tokens in found] == [5, 1, 3]

    asyncio.run(run())


def test_a_text_that_is_too_long_is_refused():
    with pytest.raises(LiveError, match=r"4,001 characters") as error:
        asyncio.run(explain(live(), Slow(1), Client(), "a" * (MAX_CHARACTERS + 1)))
    assert error.value.status == 413
