import asyncio
import json
import time
from pathlib import Path

import pytest
from openai import AsyncOpenAI

from sae_core.artifacts import ArtifactError
from sae_core.labels.budget import Budget
from sae_core.labels.client import LONGEST, ChatClient, Completion, CompletionCache, EndpointError, RequestFailed
from sae_core.study import LabelSettings

MESSAGES = [{"role": "user", "content": "name it"}]
KEY = "sk-very-secret"


@pytest.fixture
def make_client(endpoint, cache, monkeypatch):
    monkeypatch.setattr("sae_core.labels.client.RETRIES", 2)

    def make(url: str | None = None, timeout: float = 5.0, budget: Budget | None = None, **parameters) -> ChatClient:
        def connect() -> AsyncOpenAI:
            return AsyncOpenAI(base_url=url or endpoint.url, api_key=KEY, timeout=timeout, max_retries=0)

        kept = CompletionCache(cache / "completions")
        budget = budget or Budget(LabelSettings(base_url=endpoint.url), None)
        return ChatClient(connect, url or endpoint.url, "m", parameters, kept, budget)

    return make


def complete(client: ChatClient, messages=MESSAGES) -> Completion:
    async def once() -> Completion:
        try:
            return await client.complete(messages)
        finally:
            await client.close()

    return asyncio.run(once())


def drop(handler, body) -> None:
    handler.close_connection = True
    handler.connection.close()


def hang(handler, body) -> None:
    time.sleep(0.6)
    drop(handler, body)


def test_an_answer_comes_with_what_it_cost(endpoint, make_client):
    endpoint.behavior = lambda handler, body: handler.answer("hello")
    completion = complete(make_client(temperature=0.0))
    assert completion[:3] == ("hello", 100, 20)
    assert endpoint.requests[0] == {"model": "m", "messages": MESSAGES, "stream": False, "temperature": 0.0}


@pytest.mark.parametrize("trouble", [
    lambda h, b: h.error(429), lambda h, b: h.error(500), lambda h, b: h.error(503), drop, hang,
    lambda h, b: h.send("<html>bad gateway</html>", 502, "text/html"),
])  # fmt: skip
def test_passing_trouble_is_tried_again(endpoint, make_client, trouble):
    endpoint.script = [trouble, trouble]
    assert json.loads(complete(make_client(timeout=0.3)).text)["label"] == "planets"
    assert len(endpoint.requests) == 3


def test_retry_after_is_honored(endpoint, make_client):
    endpoint.script = [lambda h, b: h.error(429, Retry_After="1")]
    complete(make_client())
    assert endpoint.times[1] - endpoint.times[0] >= 1.0


@pytest.mark.parametrize("trouble", [
    lambda h, b: h.error(500), drop,
    lambda h, b: h.error(400, "the prompt is too long"),
    lambda h, b: h.send("<html>welcome</html>", kind="text/html"),
    lambda h, b: h.send('{"choices": [{"message": {"con'),
    lambda h, b: h.send("[]"), lambda h, b: h.send("null"), lambda h, b: h.send("{}"),
    lambda h, b: h.answer(None), lambda h, b: h.answer(""), lambda h, b: h.answer("x", choices=[]),
    lambda h, b: h.answer("x", choices=[{"index": 0}]),
])  # fmt: skip
def test_lasting_trouble_is_this_request_s_failure_and_is_not_kept(endpoint, make_client, cache, trouble):
    endpoint.behavior = trouble
    with pytest.raises(RequestFailed) as failure:
        complete(make_client())
    assert "\n" not in str(failure.value)
    assert not list(cache.rglob("*.json"))


@pytest.mark.parametrize(("status", "code", "words"), [
    (401, None, "OPENAI_API_KEY"), (403, None, "OPENAI_API_KEY"), (404, None, "no model 'm'"),
    (429, "insufficient_quota", "quota"),
])  # fmt: skip
def test_what_no_request_can_get_past_is_told_apart(endpoint, make_client, status, code, words):
    endpoint.behavior = lambda h, b: h.error(status, f"Incorrect API key provided: {KEY}", code)
    with pytest.raises(EndpointError, match=words) as failure:
        complete(make_client())
    assert KEY not in str(failure.value)


def test_the_key_is_in_no_error(endpoint, make_client):
    endpoint.behavior = lambda h, b: h.error(400, f"cannot serve {KEY}\nat all")
    with pytest.raises(RequestFailed, match=r"cannot serve \*\*\* at all"):
        complete(make_client())


def test_nobody_there_is_a_failure(make_client):
    with pytest.raises(RequestFailed, match="Connection error"):
        complete(make_client("http://127.0.0.1:9/v1"))


def test_parameters_that_the_server_refuses_by_name_are_left_out_from_then_on(endpoint, make_client):
    def picky(handler, body) -> None:
        refused = next((name for name in ("response_format", "seed") if name in body), None)
        handler.error(400, f"Unsupported parameter: '{refused}'") if refused else handler.answer("fine")

    endpoint.behavior = picky
    client = make_client(response_format={"type": "json_object"}, seed=1, temperature=0.5)

    async def twice() -> None:
        await client.complete(MESSAGES)
        await client.complete([{"role": "user", "content": "another"}])
        await client.close()

    asyncio.run(twice())
    assert len(endpoint.requests) == 4
    assert endpoint.requests[-1].keys() == {"model", "messages", "stream", "temperature"}


def test_the_same_request_is_paid_for_once(endpoint, make_client):
    first, second = complete(make_client(seed=0)), complete(make_client(seed=0))
    assert second == first._replace(cached=True)
    complete(make_client(seed=1))
    complete(make_client(seed=0), [{"role": "user", "content": "other"}])
    assert len(endpoint.requests) == 3


def test_a_cache_file_that_cannot_be_read_is_made_anew(endpoint, make_client, cache):
    complete(make_client())
    (file,) = cache.rglob("*.json")
    for damage in ("", '{"text": "x"}', "[]", "{"):
        file.write_text(damage)
        assert not complete(make_client()).cached
    assert complete(make_client()).cached


def test_nothing_in_the_cache_holds_the_key(make_client, cache):
    complete(make_client())
    assert all(KEY not in file.read_text() for file in cache.rglob("*.json"))


def test_a_very_long_answer_is_cut(endpoint, make_client):
    endpoint.behavior = lambda handler, body: handler.answer("word " * 10_000)
    assert len(complete(make_client()).text) == LONGEST


def test_a_full_disk_is_said_in_one_line(make_client, monkeypatch):
    def full(self: Path, *args: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(ArtifactError, match="No space left on device"):
        complete(make_client())
