"""Completions from any OpenAI-compatible server: retried, told apart when they fail, and paid for only once."""

import hashlib
import json
import re
import time
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, cast

import openai
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletion

from sae_core.artifacts import write_atomically
from sae_core.labels.prompts import Message
from sae_core.labels.reader import LabelError

LONGEST = 20_000
"""Characters of an answer that are kept."""


class EndpointError(LabelError):
    """The server will answer no request as things stand: a wrong key, a missing model, nobody there."""


class RequestFailed(LabelError):
    """One request got no answer, although it was repeated; another one may."""


class Completion(NamedTuple):
    """An answer and what it took."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    seconds: float
    """Time until the answer was there, with all retries; 0 when it came from the cache."""
    cached: bool


class CompletionCache:
    """Answers on disk, one file each, by the SHA-256 of all that decides them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, request: Any) -> Path:
        """Where the answer to a request (JSON values) is kept."""
        text = json.dumps(request, sort_keys=True, separators=(",", ":"), allow_nan=False)
        digest = hashlib.sha256(text.encode()).hexdigest()
        return self.folder / digest[:2] / f"{digest}.json"

    def get(self, path: Path) -> Completion | None:
        """The answer kept there, if there is one that can be read."""
        try:
            kept = json.loads(path.read_text("utf-8"))
            return Completion(kept["text"], kept["prompt_tokens"], kept["completion_tokens"], 0.0, cached=True)
        except (FileNotFoundError, ValueError, KeyError, TypeError):
            return None

    def put(self, path: Path, completion: Completion) -> None:
        """Keep an answer. Raises ArtifactError when the disk is full."""
        kept = {k: v for k, v in completion._asdict().items() if k in {"text", "prompt_tokens", "completion_tokens"}}
        path.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(path) as temporary:
            temporary.write_text(json.dumps(kept), "utf-8")


class ChatClient:
    """Asks one model at one server.

    Time-outs, dropped connections and the statuses 408, 409, 429 and 5xx are tried again by the SDK, with
    exponential backoff and jitter, or after the time that `Retry-After` asks for.

    Args:
        connect: makes the SDK's client; called before the first request that the cache cannot answer.
        endpoint: where that client sends to: an URL, or what identifies a local model's content.
        model: name of the model at the endpoint.
        parameters: the other fields of a request. A server that refuses one by name is asked without it from then on.
        cache: where answers are kept.
    """

    def __init__(
        self, connect: Callable[[], AsyncOpenAI], endpoint: str, model: str, parameters: dict[str, Any],
        cache: CompletionCache,
    ) -> None:  # fmt: skip
        self.connect = connect
        self.endpoint = endpoint
        self.model = model
        self.parameters = parameters
        self.cache = cache
        self._refused: set[str] = set()

    @cached_property
    def _sdk(self) -> AsyncOpenAI:
        return self.connect()

    async def close(self) -> None:
        """Close the connections, if any were made."""
        if "_sdk" in self.__dict__:
            await self._sdk.close()

    async def complete(self, messages: Sequence[Message]) -> Completion:
        """The answer to `messages`, from the cache if it was ever given.

        Raises:
            EndpointError: no request will be answered; nothing else need be tried.
            RequestFailed: this one was not.
            ArtifactError: the answer cannot be kept, because the disk is full.
        """
        path = self.cache.path([self.endpoint, self.model, list(messages), self.parameters])
        if found := self.cache.get(path):
            return found
        start = time.monotonic()
        response = await self._request(messages)
        choices = response.choices if isinstance(response, ChatCompletion) else None
        if choices is None:
            raise RequestFailed("what came back is no chat completion (does base_url end in /v1?)")
        if not choices or not choices[0].message or not choices[0].message.content:
            raise RequestFailed("the answer holds no text")
        usage = response.usage
        completion = Completion(
            choices[0].message.content[:LONGEST], usage.prompt_tokens if usage else 0,
            usage.completion_tokens if usage else 0, time.monotonic() - start, cached=False,
        )  # fmt: skip
        self.cache.put(path, completion)
        return completion

    async def _request(self, messages: Sequence[Message]) -> Any:
        """What the server sends back, whatever it is."""
        while True:
            sent = {key: value for key, value in self.parameters.items() if key not in self._refused}
            try:
                return await self._sdk.chat.completions.create(
                    model=self.model, messages=cast(Any, messages), stream=False, **sent
                )
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                refused = {key for key in sent if re.search(rf"\b{key}\b", str(error))}
                if not refused:
                    raise RequestFailed(self._say(error)) from None
                self._refused |= refused
            except (openai.OpenAIError, ValueError) as error:
                raise self._sort(error) from None

    def _sort(self, error: Exception) -> LabelError:
        """Whether an error is one request's or the endpoint's."""
        match error:
            case openai.AuthenticationError() | openai.PermissionDeniedError():
                why = f"refuses the key ({error.status_code}): set OPENAI_API_KEY to one that is valid there"
            case openai.NotFoundError():
                why = f"knows no model {self.model!r} (404): correct labels.model or labels.base_url"
            case openai.RateLimitError(code="insufficient_quota"):
                why = "says that the account's quota is used up (429): add to it, then run again"
            case openai.OpenAIError():
                return RequestFailed(self._say(error))
            case _:  # the SDK lets a body that is no JSON, though called so, through as json's own error
                return RequestFailed(f"what came back is no JSON ({error})")
        return EndpointError(f"{self.endpoint} {why}")

    def _say(self, error: openai.OpenAIError) -> str:
        """The error on one line, never with the key in it."""
        return " ".join(str(error).split()).replace(self._sdk.api_key, "***")[:300]
