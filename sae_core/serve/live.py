"""The language model behind an atlas: loaded when it is first asked for, one for all that is asked of it."""

import asyncio
from collections.abc import Iterator
from typing import TYPE_CHECKING, TypeVar

from fastapi import Request

from sae_core.atlas import Atlas, ExplainedToken
from sae_core.errors import MindAtlasError
from sae_core.serve.turns import BusyError, Stream, Turns
from sae_core.studies import Studies

if TYPE_CHECKING:
    from sae_core.dictionary import Dictionary
    from sae_core.language_model import LanguageModel
    from sae_core.prompt_reader import PromptReader
    from sae_core.study import ModelSettings

T = TypeVar("T")

MAX_CHARACTERS = 4000
"""Of a text that the model is to read."""
_PLACES = 32  # requests that take turns
_SECONDS = 30.0  # for one text, with waiting and, the first time, loading
_LOOK = 0.1  # seconds between two looks whether anyone still waits for the answer


class LiveError(MindAtlasError):
    """Something that the live model does not do, now or at all."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status
        """HTTP status of the answer."""


class Live:
    """Runs the live model in a thread of its own, where everybody gets a turn; with bounds on text, time and places."""

    def __init__(self, studies: Studies, seconds: float = _SECONDS, places: int = _PLACES) -> None:
        self.studies, self.seconds = studies, seconds
        self._turns = Turns(places)
        self._loaded: tuple[ModelSettings, LanguageModel] | None = None
        self._dictionary: tuple[Atlas, Dictionary] | None = None

    def start(self, items: Iterator[T]) -> Stream[T]:
        """What the iterator yields; its code runs in the model's thread. Raises LiveError when no place is free."""
        try:
            return self._turns.start(items)
        except BusyError as error:
            raise LiveError(str(error), 503) from None

    def ready(self, atlas: Atlas) -> "tuple[LanguageModel, Dictionary]":
        """The model that the atlas describes and its dictionary. To be called in the model's thread only."""
        lm = self._model(atlas)
        if self._dictionary is None or self._dictionary[0] is not atlas:
            self._dictionary = atlas, atlas.load_dictionary().to(lm.device)
        return lm, self._dictionary[1]

    def reader(self, atlas: Atlas) -> "PromptReader":
        """Reads texts with both. To be called in the model's thread only."""
        from sae_core.prompt_reader import PromptReader

        return PromptReader.of(atlas, *self.ready(atlas))

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
        tokens = self.start(self._explain(atlas, text, per_token, feature))
        work = asyncio.ensure_future(_all(tokens))
        try:
            async with asyncio.timeout(self.seconds):
                while not (await asyncio.wait({work}, timeout=_LOOK))[0]:
                    if await request.is_disconnected():
                        raise LiveError("nobody waits for the answer any more", 499)
                return work.result()
        except TimeoutError:
            what = f"no answer within {self.seconds:g} s: try again, or give a shorter text"
            raise LiveError(what, 504) from None
        finally:
            work.cancel()
            tokens.close()

    def _explain(self, atlas: Atlas, text: str, per_token: int, feature: int | None) -> Iterator[ExplainedToken]:
        yield from atlas.explain_lazily(self._model(atlas), text, per_token, feature)

    def _model(self, atlas: Atlas) -> "LanguageModel":
        """The model that the atlas describes."""
        return self.model(self.studies.order(atlas.dictionary).study.model)

    def model(self, settings: "ModelSettings") -> "LanguageModel":
        """A model, the only one that is loaded then. To be called in the model's thread only."""
        from sae_core.language_model import LanguageModel  # torch, which nothing else here needs

        if self._loaded is None or self._loaded[0] != settings:
            self._loaded = None  # two models may not fit
            self._loaded = settings, LanguageModel.load(settings, precision="float32")
        return self._loaded[1]


async def _all(items: Stream[T]) -> list[T]:
    return [item async for item in items]
