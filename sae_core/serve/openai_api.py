"""A steered model behind OpenAI's API: `/v1/chat/completions`, `/v1/completions` and `/v1/models`.

Any client of OpenAI's talks to it. The model as it is has the model's name; a preset's name after a `+` steers it
(`smollm2-135m-instruct+golden-gate`); the extra field `steering` does in any request:

    "steering": [{"feature": 1234, "strength": 10, "method": "clamp"}], "steering_scope": "all"

What is not supported is refused by name, unless it is given the value that changes nothing. Errors have OpenAI's shape.
"""

import json
import secrets
import time
import tomllib
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from starlette.responses import JSONResponse, Response

from sae_core.artifacts import ArtifactError
from sae_core.atlas import Atlas
from sae_core.errors import MindAtlasError
from sae_core.serve.live import Live, LiveError
from sae_core.serve.streams import EventStream, SteerField, event, next_item
from sae_core.serve.turns import Stream
from sae_core.steers import Scope, Steer, SteeringError, cautions, parse_steers

if TYPE_CHECKING:
    from sae_core.generation import Prompt, Sampling, Token

PRESETS = "steered.toml"
"""File in the home folder: a line `name = "1234:10, 99:-2:add"` makes a steered model of that name."""
RETRY_SECONDS = 2
_NEUTRAL: dict[str, Any] = {
    "n": 1, "frequency_penalty": 0, "presence_penalty": 0, "logit_bias": {}, "top_logprobs": 0, "store": False,
    "tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "echo": False, "best_of": 1, "suffix": "",
}  # fmt: skip
"""Parameters that are not supported, and the value that asks for nothing."""

Presets = Mapping[str, tuple[Steer, ...]]


class ApiError(Exception):
    """An answer of OpenAI's shape that says what was wrong."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def response(self) -> JSONResponse:
        """As a client of OpenAI's reads it."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        error = {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        headers = {"Retry-After": str(RETRY_SECONDS)} if self.status == 503 else None
        return JSONResponse({"error": error}, self.status, headers)


def load_presets(home: Path) -> dict[str, tuple[Steer, ...]]:
    """The steered models that `steered.toml` in the home folder names; none without it.

    Raises SteeringError when it is no such file.
    """
    path = home / PRESETS
    if not path.exists():
        return {}
    try:
        lines = tomllib.loads(path.read_text("utf-8"))
        return {name: parse_steers(str(text)) for name, text in lines.items()}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, SteeringError) as error:
        raise SteeringError(f'{path}: {error}: write lines such as golden-gate = "1234:10"') from None


class _Common(BaseModel):
    """What both kinds of request may say. Unknown fields are refused."""

    model_config = ConfigDict(extra="forbid")
    model: str
    stream: bool = False
    stream_options: dict[Literal["include_usage", "include_obfuscation"], bool] | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(1.0, ge=0, le=2, allow_inf_nan=False)
    top_p: float = Field(1.0, gt=0, le=1, allow_inf_nan=False)
    seed: int | None = None
    stop: str | list[str] | None = None
    user: str | None = None
    """Says who asks, which changes nothing here."""
    steering: list[SteerField] = []
    steering_scope: Scope = "all"

    @field_validator("temperature", "top_p", "stream", "steering", "steering_scope", mode="before")
    @classmethod
    def _null_is_default(cls, value: Any, info: Any) -> Any:
        return cls.model_fields[info.field_name].get_default() if value is None else value

    @property
    def sampling(self) -> "Sampling":
        from sae_core.generation import Sampling  # torch, in the model's thread

        stop = [self.stop] if isinstance(self.stop, str) else self.stop or []
        seed = secrets.randbelow(2**31) if self.seed is None else self.seed
        return Sampling(self.max_tokens or 512, self.temperature, self.top_p, seed, tuple(stop))


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """A turn of a conversation."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Part]

    @property
    def turn(self) -> dict[str, str]:
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class _Chat(_Common):
    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None

    @property
    def prompt_text(self) -> list[dict[str, str]]:
        return [message.turn for message in self.messages]

    @property
    def sampling(self) -> "Sampling":
        limit = self.max_completion_tokens or self.max_tokens
        return super().sampling._replace(max_tokens=limit) if limit else super().sampling


class _Completion(_Common):
    prompt: str

    @property
    def prompt_text(self) -> str:
        return self.prompt


class _Read(NamedTuple):
    """First of a stream: the prompt was read."""

    prompt: "Prompt"
    notes: list[str]
    strings: Callable[[list[int]], list[str]]
    """Tokens by themselves."""


class OpenAIRoute(APIRoute):
    """Gives errors OpenAI's shape."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def shaped(request: Request) -> Response:
            try:
                return await handle(request)
            except ApiError as error:
                return error.response()
            except LiveError as error:
                return ApiError(error.status, str(error), code="overloaded" if error.status == 503 else None).response()
            except SteeringError as error:
                return ApiError(400, str(error), "steering").response()
            except ArtifactError as error:
                return ApiError(404, str(error)).response()
            except RequestValidationError as error:
                return _refusal(error.errors()[0]).response()
            except MindAtlasError as error:
                return ApiError(400, str(error)).response()

        return shaped


class SteeredModels:
    """The model as it is and its steered presets, for many requests at once."""

    def __init__(self, atlas: Callable[[], Atlas], live: Live, presets: Presets) -> None:
        self._atlas, self._live, self._presets = atlas, live, presets

    def names(self) -> list[str]:
        """Of the model, and of each preset."""
        base = self._atlas().site.model
        return [base, *(f"{base}+{name}" for name in self._presets)]

    def start(self, request: _Chat | _Completion) -> "Stream[_Read | Token]":
        """The answer's tokens, after the prompt; raises ApiError of an unknown model, LiveError."""
        names = self.names()
        if request.model not in names:
            what = f"the model {request.model!r} does not exist: there are {', '.join(names)}"
            raise ApiError(404, what, "model", "model_not_found")
        steers = [s.steer for s in request.steering]
        return self._live.start(
            self._answer(request, [*self._presets.get(request.model[len(names[0]) + 1 :], ()), *steers])
        )

    def _answer(self, request: _Chat | _Completion, steers: list[Steer]) -> "Iterator[_Read | Token]":
        """In the model's thread."""
        from sae_core.generation import read_prompt, stream  # torch, which nothing else here needs
        from sae_core.steering import Steering, max_acts

        atlas = self._atlas()
        lm, dictionary = self._live.ready(atlas)
        steering = None
        if steers:
            steering = Steering(
                atlas.site, dictionary, steers, max_acts(atlas), sink_norm=atlas.sink_norm, scope=request.steering_scope
            )
        prompt, notes = read_prompt(lm, request.prompt_text), cautions(atlas, steers)
        if isinstance(request, _Chat) and not lm.tokenizer.chat_template:
            notes.append("the model has no chat template: it completes the messages as plain text")
        yield _Read(prompt, notes, lm.token_strings)
        yield from stream(lm, prompt, request.sampling, steering)


def openai_api(atlas: Callable[[], Atlas], live: Live, presets: Presets | None = None) -> APIRouter:
    """The routes.

    Args:
        atlas: the atlas to steer with; the same object as long as nothing was made anew.
        live: its language model; who comes when all its places are taken is told to come back.
        presets: steered models by name.
    """
    models = SteeredModels(atlas, live, presets or {})
    router = APIRouter(route_class=OpenAIRoute, include_in_schema=False)

    @router.get("/v1/models")
    def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(name) for name in models.names()]}

    @router.get("/v1/models/{name}")
    def one_model(name: str) -> dict[str, Any]:
        if name not in models.names():
            raise ApiError(404, f"the model {name!r} does not exist", "model", "model_not_found")
        return _model(name)

    @router.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await _respond(request, models, await _read(request, _Chat))

    @router.post("/v1/completions")
    async def complete(request: Request) -> Response:
        return await _respond(request, models, await _read(request, _Completion))

    @router.api_route("/v1/{rest:path}", methods=["GET", "POST", "DELETE"])
    def nothing(rest: str) -> None:
        raise ApiError(404, f"/v1/{rest} is not served here: chat/completions, completions, models and monitor are")

    return router


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "mind-atlas"}


async def _read(request: Request, kind: type[_Chat] | type[_Completion]) -> Any:
    """The request's body, checked. Raises ApiError."""
    try:
        body = json.loads(await request.body())
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is no JSON: {error}") from None
    if not isinstance(body, dict):
        raise ApiError(400, "the body is no JSON object")
    unknown = [name for name in body if name not in kind.model_fields and body[name] not in (None, _NEUTRAL.get(name))]
    if unknown:
        what = f"{unknown[0]!r} is not supported here: leave it out"
        raise ApiError(400, what, unknown[0], "unsupported_parameter")
    try:
        return kind.model_validate({name: body[name] for name in body if name in kind.model_fields})
    except ValidationError as error:
        raise _refusal(error.errors()[0]) from None


def _refusal(problem: Mapping[str, Any]) -> ApiError:
    """What pydantic says of a field, or FastAPI of the body."""
    if problem["type"] == "json_invalid":
        return ApiError(400, f"the body is no JSON: {problem['ctx']['error']}")
    where = ".".join(str(part) for part in problem["loc"] if part != "body")
    return ApiError(400, f"{where}: {problem['msg']}" if where else str(problem["msg"]), where or None)


async def _respond(request: Request, models: SteeredModels, asked: _Chat | _Completion) -> Response:
    tokens = models.start(asked)
    try:
        read = await next_item(request, tokens)
        assert isinstance(read, _Read), "a stream begins with its prompt"
        answer = _Answer(asked, read)
        if asked.stream:
            return EventStream(_events(tokens, answer), tokens)
        while (token := await next_item(request, tokens)) is not None:
            assert not isinstance(token, _Read), "after its prompt, a stream is tokens"
            answer.add(token)
        return JSONResponse(answer.whole())
    except BaseException:
        tokens.close()
        raise


async def _events(tokens: "Stream[_Read | Token]", answer: "_Answer") -> AsyncIterator[str]:
    try:
        yield event(answer.first())
        async for token in tokens:
            assert not isinstance(token, _Read), "after its prompt, a stream is tokens"
            yield event(answer.add(token))
        if answer.wants_usage:
            yield event(answer.usage_chunk())
        yield "data: [DONE]\n\n"
    except MindAtlasError as error:
        yield event({"error": {"message": str(error), "type": "server_error", "param": None, "code": None}})


class _Answer:
    """An answer on its way, in the shapes of OpenAI's API."""

    def __init__(self, asked: _Chat | _Completion, read: _Read) -> None:
        self._chat, self._read = isinstance(asked, _Chat), read
        self._logprobs = isinstance(asked, _Chat) and bool(asked.logprobs)
        self._head = {
            "id": f"{'chatcmpl' if self._chat else 'cmpl'}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": asked.model,
        }
        self._tokens: list[Token] = []
        self.wants_usage = bool((asked.stream_options or {}).get("include_usage"))

    def first(self) -> dict[str, Any]:
        """Before any token; `notes` is ours."""
        return self._chunk({"role": "assistant", "content": ""}, "", None, None) | self._notes()

    def add(self, token: "Token") -> dict[str, Any]:
        """The event of one more token."""
        self._tokens.append(token)
        logprobs = self._logprobs_of([token]) if self._logprobs else None
        return self._chunk({"content": token.text}, token.text, token.finish or None, logprobs)

    def usage_chunk(self) -> dict[str, Any]:
        """After the last token, where it was asked for."""
        return self._chunk({}, "", None, None) | {"choices": [], "usage": self._usage()}

    def whole(self) -> dict[str, Any]:
        """The answer in one piece."""
        text = "".join(token.text for token in self._tokens)
        finish = self._tokens[-1].finish if self._tokens else "length"
        choice: dict[str, Any] = {"index": 0, "finish_reason": finish, "logprobs": None}
        if self._logprobs:
            choice["logprobs"] = self._logprobs_of(self._tokens)
        choice |= {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        kind = "chat.completion" if self._chat else "text_completion"
        return {**self._head, "object": kind, "choices": [choice], "usage": self._usage(), **self._notes()}

    def _chunk(
        self, delta: dict[str, str], text: str, finish: str | None, logprobs: dict[str, Any] | None
    ) -> dict[str, Any]:
        kind = "chat.completion.chunk" if self._chat else "text_completion"
        choice = {"index": 0, "logprobs": logprobs, "finish_reason": finish}
        choice |= {"delta": delta} if self._chat else {"text": text}
        return {**self._head, "object": kind, "choices": [choice]}

    def _logprobs_of(self, tokens: "list[Token]") -> dict[str, Any]:
        shown = [(self._read.strings([token.id])[0], token.logprob) for token in tokens]
        content = [
            {"token": text, "logprob": logprob, "bytes": list(text.encode()), "top_logprobs": []}
            for text, logprob in shown
        ]
        return {"content": content, "refusal": None}

    def _usage(self) -> dict[str, int]:
        read, written = len(self._read.prompt.ids), len(self._tokens)
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    def _notes(self) -> dict[str, Any]:
        return {"notes": self._read.notes} if self._read.notes else {}
