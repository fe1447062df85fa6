"""Completions from any OpenAI-compatible server: retried, told apart when they fail, and paid for only once."""

import asyncio
import hashlib
import json
import re
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import openai
from openai import AsyncOpenAI
from openai.types.chat import ChatCompletion

from sae_core.artifacts import ArtifactError, write_atomically
from sae_core.labels.budget import Budget
from sae_core.labels.pace import LONGEST_WAIT, RETRIES, Pace, asked_to_wait, is_passing
from sae_core.labels.prices import NOTHING, Usage
from sae_core.labels.prompts import Message
from sae_core.labels.reader import LabelError

LONGEST = 20_000
"""Characters of an answer that are kept."""
_NAMES = {"response_format": r"(?i)response.?format|json.?schema"}
"""How servers call a parameter that they refuse, where not by its name alone."""


class EndpointError(LabelError):
    """The server will answer no request as things stand: a wrong key, a missing model, nobody there."""


class EndpointDown(EndpointError):
    """The server answered, and does so no more; some time later it may."""

    passing = True


class RequestFailed(LabelError):
    """One request got no answer that holds text, although it was repeated; another one may."""

    def __init__(self, message: str, usage: Usage = NOTHING) -> None:
        super().__init__(message)
        self.usage = usage
        """The tokens that an answer without text took."""


class Completion(NamedTuple):
    """An answer and what it took when it was bought."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    prefix_tokens: int = 0
    """Tokens of the prompt that the server had read before (see `Usage`)."""
    requests: int = 1
    """Requests sent until the answer came."""
    seconds: float = 0.0
    """Time until the answer was there, with all pauses."""
    made_at: str = ""
    """When it was there: ISO 8601, UTC."""
    cached: bool = False
    """True when it came from the cache, and took nothing now."""
    logprobs: list[tuple[str, dict[str, float]]] | None = None
    """Each token of the answer, and the log-probabilities of what might stand there; None where they were not asked
    for, or the server gives none."""

    def told(self) -> dict[str, Any]:
        """All of it but the log-probabilities, which are many."""
        return {key: value for key, value in self._asdict().items() if key != "logprobs"}

    @property
    def usage(self) -> Usage:
        return Usage(self.prompt_tokens, self.completion_tokens, self.prefix_tokens)


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
            return Completion(**json.loads(path.read_text("utf-8")), cached=True)
        except (OSError, ValueError, TypeError):
            return None

    def prepare(self, path: Path) -> None:
        """Make the folder, before anything is paid for. Raises ArtifactError when nothing can be written there."""
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArtifactError(f"cannot write {path}: {error.strerror}; set MIND_ATLAS_CACHE elsewhere") from None

    def put(self, path: Path, completion: Completion) -> None:
        """Keep an answer, after `prepare`. Raises ArtifactError when the disk is full."""
        kept = {key: value for key, value in completion._asdict().items() if key != "cached"}
        with write_atomically(path) as temporary:
            temporary.write_text(json.dumps(kept), "utf-8")


class ChatClient:
    """Asks one model at one server.

    Passing faults (see `pace`) are tried again, with pauses that grow and vary, or as long as the server asks for in
    `Retry-After`; when it has too many requests, all wait.

    Args:
        connect: makes the SDK's client; called before the first request that the cache cannot answer.
        endpoint: where that client sends to: an URL, or what identifies a local model's content.
        model: name of the model at the endpoint.
        parameters: the other fields of a request. A server that refuses one by name is asked without it from then on.
        cache: where answers are kept.
        budget: what may be spent.
        at_once: requests under way at once; who comes when so many are waits for a place.
    """

    def __init__(
        self, connect: Callable[[], AsyncOpenAI], endpoint: str, model: str, parameters: dict[str, Any],
        cache: CompletionCache, budget: Budget, at_once: int = 8,
    ) -> None:  # fmt: skip
        self.connect = connect
        self.endpoint = endpoint
        self.model = model
        self.parameters = parameters
        self.cache = cache
        self.budget = budget
        self._pace = Pace()
        self._places = asyncio.Semaphore(at_once)
        self._refused: set[str] = set()
        self._settled: set[Path] = set()
        self._under_way: WeakValueDictionary[Path, asyncio.Lock] = WeakValueDictionary()

    @cached_property
    def _sdk(self) -> AsyncOpenAI:
        return self.connect()

    async def close(self) -> None:
        """Close the connections, if any were made."""
        if "_sdk" in self.__dict__:
            await self._sdk.close()

    def place(self, messages: Sequence[Message], **parameters: Any) -> Path:
        """Where the cache keeps the answer to `complete`, once there is one."""
        return self.cache.path([self.endpoint, self.model, list(messages), self.parameters | parameters])

    def settle(self, messages: Sequence[Message], **parameters: Any) -> Completion | None:
        """The kept answer to `complete`, if there is one, counted by the budget (once) though it takes nothing now.

        Settle all that will be asked before the first request of a run whose budget is limited: else what is left for
        new requests hangs on which answers are met first.
        """
        path = self.place(messages, **parameters)
        if (found := self.cache.get(path)) and path not in self._settled:
            self._settled.add(path)
            self.budget.charge(found.usage, found.requests)
        return found

    async def complete(self, messages: Sequence[Message], **parameters: Any) -> Completion:
        """The answer to `messages`, from the cache if it was ever given; asked twice at once, it is bought once.

        Args:
            messages: the conversation so far.
            parameters: fields of this request in place of the client's.

        Raises:
            EndpointError: no request will be answered; nothing else need be tried.
            RequestFailed: this one was not.
            BudgetReached: it might cost more than is left.
            ArtifactError: the answer cannot be kept, because the disk is full.
        """
        path = self.place(messages, **parameters)
        async with self._under_way.setdefault(path, asyncio.Lock()):
            if found := self.settle(messages, **parameters):
                return found
            self.cache.prepare(path)
            async with self._places:
                completion = await self._buy(messages, self.parameters | parameters)
            self._settled.add(path)
            await asyncio.to_thread(self.cache.put, path, completion)  # the disk must not hold up the others
            return completion

    async def _buy(self, messages: Sequence[Message], parameters: dict[str, Any]) -> Completion:
        start = time.monotonic()
        with self.budget.set_aside(messages, parameters.get("max_tokens", 0)):
            response, requests = await self._ask(messages, parameters)
            if not isinstance(response, ChatCompletion) or response.choices is None:
                raise RequestFailed("what came back is no chat completion (does base_url end in /v1?)")
            usage = _usage(response)
            self.budget.charge(usage)
        if not response.choices or not response.choices[0].message or not response.choices[0].message.content:
            raise RequestFailed("the answer holds no text", usage)
        text, seconds = response.choices[0].message.content[:LONGEST], time.monotonic() - start
        now = datetime.now(UTC).isoformat("T", "seconds")
        logprobs = _logprobs(response) if parameters.get("logprobs") else None
        return Completion(text, *usage, requests, round(seconds, 3), now, logprobs=logprobs)

    async def _ask(self, messages: Sequence[Message], parameters: dict[str, Any]) -> tuple[Any, int]:
        """What the server sends back, whatever it is, and how many requests that took."""
        turn = requests = 0
        while True:
            await self._pace.wait()
            self.budget.count_request()
            requests += 1
            sent = self._taken(parameters)
            try:
                # In extra_body, as elsewhere the SDK first walks through the types of all messages, which takes longer
                # than the rest of a request together.
                body = {"messages": messages, **sent}
                ask = self._sdk.chat.completions.create
                return await ask(model=self.model, messages=[], stream=False, extra_body=body), requests
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                refused = {key for key in sent if re.search(_NAMES.get(key, rf"\b{key}\b"), str(error))}
                if not refused:
                    raise RequestFailed(self._say(error)) from None
                self._refused |= refused
            except (openai.OpenAIError, ValueError) as error:
                if turn == RETRIES or not is_passing(error):
                    raise self._sort(error) from None
                await self._pace.pause(error, turn)
                turn += 1

    def _taken(self, parameters: dict[str, Any]) -> dict[str, Any]:
        """The parameters, less empty ones and those that the server refused; one bound of the length has two names."""
        renamed = {"max_completion_tokens": parameters["max_tokens"]} if "max_tokens" in self._refused else {}
        given = {key: value for key, value in (parameters | renamed).items() if value is not None}
        return {key: value for key, value in given.items() if key not in self._refused}

    def _sort(self, error: Exception) -> LabelError:
        """Whether an error is one request's or the endpoint's."""
        match error:
            case openai.AuthenticationError() | openai.PermissionDeniedError():
                why = f"refuses the key ({error.status_code}): set OPENAI_API_KEY to one that is valid there"
            case openai.NotFoundError():
                why = f"knows no model {self.model!r} (404): correct labels.model or labels.base_url"
            case openai.RateLimitError(code="insufficient_quota"):
                why = "says that the account's quota is used up (429): add to it, then run again"
            case openai.APIStatusError() if (asked_to_wait(error) or 0) > LONGEST_WAIT:
                why = f"asks to wait {asked_to_wait(error):.0f} s ({error.status_code}); what was answered is kept"
                return EndpointDown(f"{self.endpoint} {why}")
            case openai.OpenAIError():
                return RequestFailed(self._say(error))
            case _:  # the SDK lets a body that is no JSON, though called so, through as json's own error
                return RequestFailed(f"what came back is no JSON ({error})")
        return EndpointError(f"{self.endpoint} {why}")

    def _say(self, error: openai.OpenAIError) -> str:
        """The error on one line, never with the key in it."""
        return " ".join(str(error).split()).replace(self._sdk.api_key, "***")[:300]


def _logprobs(response: ChatCompletion) -> list[tuple[str, dict[str, float]]] | None:
    """See `Completion.logprobs`."""
    told = response.choices[0].logprobs
    if told is None or not told.content:
        return None
    return [  # the SDK lets what is missing through, as None
        (at.token or "", {o.token: o.logprob for o in at.top_logprobs or () if o.token and o.logprob is not None})
        for at in told.content
    ]


def _usage(response: ChatCompletion) -> Usage:
    """The tokens that a server says it took; none where it does not say."""
    if (usage := response.usage) is None:
        return NOTHING
    details = usage.prompt_tokens_details
    return Usage(usage.prompt_tokens or 0, usage.completion_tokens or 0, (details and details.cached_tokens) or 0)
