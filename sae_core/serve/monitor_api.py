"""Alerts on a text or a conversation, over HTTP: `POST /v1/monitor`, on the live model."""

import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import asdict
from typing import Any

from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict, Field, model_validator

from sae_core.atlas import Atlas
from sae_core.errors import MindAtlasError
from sae_core.safety.shapes import Alert
from sae_core.serve.live import MAX_CHARACTERS, Live
from sae_core.serve.openai_api import ApiError, ChatMessage, OpenAIRoute
from sae_core.serve.shelf import Shelf
from sae_core.serve.streams import EventStream, in_time

JSON_LINES = "application/x-ndjson"
_PIECE = 32  # tokens between two turns of others


class MonitorQuestion(BaseModel):
    """A text or a conversation, and what to watch it for."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)
    text: str | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1)
    """A conversation, in place of `text`; the model's chat template is applied."""
    concepts: list[str] = Field([], max_length=100)
    """Watch for these; empty: for all that the audit calibrated."""
    false_positive_rate: float = Field(0.05, gt=0, lt=1)
    """Share of texts not about a concept, like those it was calibrated on, that may raise an alert."""
    base_rate: float = Field(0.5, gt=0, lt=1)
    """Share of texts that are about a concept, for the probabilities."""
    stream: bool = False
    """Alerts as lines of JSON, each as soon as its run of tokens has ended."""
    dictionary: str = ""

    @model_validator(mode="after")
    def _one_of_both(self) -> "MonitorQuestion":
        if (self.text is None) == (self.messages is None):
            raise ValueError("give either text or messages")
        return self

    @property
    def characters(self) -> int:
        """Of all that is to be read."""
        return len(self.text or "") + sum(len(message.turn["content"]) for message in self.messages or ())


class Watched(BaseModel):
    """What was read."""

    model_config = ConfigDict(use_attribute_docstrings=True)
    dictionary: str
    tokens: int
    windows: int
    """More than 1: the text is longer than the context, and each window was read without what came before."""


class MonitorAnswer(Watched):
    """All alerts, by concept and place."""

    alerts: list[Alert]


class Problem(BaseModel):
    """An error of OpenAI's shape."""

    error: dict[str, str | None]


_LINES = 'With `stream`: a line of JSON for each alert; the last one is `{"end": ...}` or `{"error": ...}`.'
_RESPONSES: dict[int | str, dict[str, Any]] = {
    200: {"content": {JSON_LINES: {"schema": {"type": "string", "description": _LINES}}}},
    "4XX": {"model": Problem, "description": "What was sent is wrong, or there is no audit."},
    "5XX": {"model": Problem, "description": "No place is free (503), or the time is up (504)."},
}


def monitor_api(shelf: Shelf, live: Live) -> APIRouter:
    """The route; to be included before OpenAI's, which answers for all else under `/v1`."""
    router = APIRouter(route_class=OpenAIRoute, tags=["monitor"])

    @router.post("/v1/monitor", response_model=MonitorAnswer, responses=_RESPONSES)
    async def monitor(request: Request, asked: MonitorQuestion) -> Any:
        """Where features that stand for a concept fire, at thresholds set for a rate of false alarms.

        Silence proves nothing: see what the audit found of each concept, and how a linear probe does.
        """
        if asked.characters > MAX_CHARACTERS:
            what = f"the text has {asked.characters:,} characters: give at most {MAX_CHARACTERS:,}"
            raise ApiError(413, what, "text" if asked.messages is None else "messages")
        made = live.start(_watch(live, shelf.atlas(asked.dictionary), asked))
        try:
            items = in_time(request, made, live.seconds)
            read = await anext(items)
            assert isinstance(read, Watched), "what is read is told first"
            if asked.stream:
                return EventStream(_lines(read, items), made, JSON_LINES)
            alerts = sorted([alert async for alert in _alerts(items)])
            made.close()
            return MonitorAnswer(**read.model_dump(), alerts=alerts)
        except BaseException:
            made.close()
            raise

    return router


def _watch(live: Live, atlas: Atlas, asked: MonitorQuestion) -> Iterator[Watched | list[Alert]]:
    """What was read, then the alerts piece by piece. In the model's thread."""
    from sae_core.safety.monitor import Monitor, chat_text, detectors_of  # torch, which nothing else here needs

    detectors = detectors_of(atlas, asked.concepts)
    reader = live.reader(atlas)
    monitor = Monitor(reader, detectors, asked.false_positive_rate, asked.base_rate)
    turns = [message.turn for message in asked.messages or ()]
    windows = reader.windows([asked.text if asked.text is not None else chat_text(turns, reader.lm.tokenizer)])
    ids = [token for window in windows for token in window.ids]
    yield Watched(dictionary=atlas.dictionary, tokens=len(ids), windows=len(windows))
    stream = monitor.stream()
    for at in range(0, len(ids), _PIECE):
        yield stream.push(ids[at : at + _PIECE])
    yield stream.close()


async def _lines(read: Watched, items: AsyncIterator[Watched | list[Alert]]) -> AsyncIterator[str]:
    try:
        async for alert in _alerts(items):
            yield _line(asdict(alert))
        yield _line({"end": read.model_dump()})
    except MindAtlasError as error:
        yield _line({"error": {"message": str(error), "type": "server_error", "param": None, "code": None}})


async def _alerts(items: AsyncIterator[Watched | list[Alert]]) -> AsyncIterator[Alert]:
    async for some in items:
        assert isinstance(some, list), "after what was read, there are alerts"
        for alert in some:
            yield alert


def _line(row: dict[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"
