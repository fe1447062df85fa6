"""The language model behind an atlas: loaded when it is first asked for, it reads one text at a time."""

import asyncio
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from fastapi import Request

from sae_core.atlas import Atlas, ExplainedToken
from sae_core.errors import MindAtlasError
from sae_core.studies import Studies

if TYPE_CHECKING:
    from sae_core.language_model import LanguageModel
    from sae_core.study import ModelSettings

MAX_CHARACTERS = 4000
"""Of a text that the model is to read."""
_PLACES = 4  # requests that wait or are worked on
_SECONDS = 30.0  # for one request, with waiting and, the first time, loading
_LOOK = 0.1  # seconds between two looks whether anyone still waits for the answer


class LiveError(MindAtlasError):
    """A text that the live model does not read, now or at all."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status
        """HTTP status of the answer."""


class Live:
    """Runs the live model in a thread of its own, with bounds on text, time and requests at once."""

    def __init__(self, studies: Studies, seconds: float = _SECONDS, places: int = _PLACES) -> None:
        self.studies, self._seconds, self._places = studies, seconds, places
        self._thread = ThreadPoolExecutor(1, "live-model")
        self._taken = 0
        self._loaded: tuple[ModelSettings, LanguageModel] | None = None

    async def explain(
        self, request: Request, atlas: Atlas, text: str, per_token: int, feature: int | None = None
    ) -> list[ExplainedToken]:
        """As `Atlas.explain`; when the client goes away or the time is up, the work ends after the present block.

        Raises:
            LiveError: the text is too long, the time is up, or too many are waiting.
            MindAtlasError: the model cannot be loaded, or the text not be read.
        """
        if len(text) > MAX_CHARACTERS:
            raise LiveError(f"the text has {len(text):,} characters: give at most {MAX_CHARACTERS:,}", 413)
        if self._taken >= self._places:
            raise LiveError("the model is busy with other texts: try again in a moment", 503)
        self._taken += 1
        stop = threading.Event()
        work = self._thread.submit(self._explain, atlas, text, per_token, feature, stop)
        try:
            return await self._result(request, asyncio.wrap_future(work))
        finally:
            stop.set()
            work.cancel()
            self._taken -= 1

    async def _result(self, request: Request, work: "asyncio.Future[list[ExplainedToken]]") -> list[ExplainedToken]:
        deadline = time.monotonic() + self._seconds
        while not work.done():
            await asyncio.wait({work}, timeout=_LOOK)
            if not work.done() and await request.is_disconnected():
                raise LiveError("nobody waits for the answer any more", 499)
            if not work.done() and time.monotonic() > deadline:
                raise LiveError(f"no answer within {self._seconds:g} s: try again, or give a shorter text", 504)
        return work.result()

    def _explain(
        self, atlas: Atlas, text: str, per_token: int, feature: int | None, stop: threading.Event
    ) -> list[ExplainedToken]:
        lm, found = self._model(atlas), []
        for token in atlas.explain_lazily(lm, text, per_token, feature):
            if stop.is_set():
                break
            found.append(token)
        return found

    def _model(self, atlas: Atlas) -> "LanguageModel":
        """The model that the atlas describes. Only the model's own thread calls this."""
        from sae_core.language_model import LanguageModel  # torch, which nothing else here needs

        settings = self.studies.order(atlas.dictionary).study.model
        if self._loaded is None or self._loaded[0] != settings:
            self._loaded = None  # two models may not fit
            self._loaded = settings, LanguageModel.load(settings, precision="float32")
        return self._loaded[1]
