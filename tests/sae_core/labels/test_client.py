import asyncio
import json
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path
from types import SimpleNamespace

import pytest
from openai import AsyncOpenAI

from sae_core.artifacts import ArtifactError
from sae_core.labels.budget import Budget, BudgetReached
from sae_core.labels.client import (
    LONGEST,
    ChatClient,
    Completion,
    CompletionCache,
    EndpointDown,
    EndpointError,
    RequestFailed,
)
from sae_core.labels.prices import NOTHING, Usage, find_prices
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
    time.sleep(1.5)
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
    assert json.loads(complete(make_client(timeout=1.0)).text)["label"] == "planets"
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


def together(client: ChatClient, *conversations: list) -> list:
    """Answers to all, asked at once; a failure in place of what failed."""

    async def ask_all() -> list:
        try:
            return await asyncio.gather(*map(client.complete, conversations), return_exceptions=True)
        finally:
            await client.close()

    return asyncio.run(ask_all())


def about(text: str) -> list:
    return [{"role": "user", "content": text}]


def test_when_the_server_has_too_many_from_one_all_wait(endpoint, make_client, monkeypatch):
    def limited(handler, body) -> None:
        if len(endpoint.requests) == 1:
            handler.error(429, Retry_After="0.6")
        else:
            time.sleep(0.1)
            handler.answer("fine")

    async def staggered(client: ChatClient) -> None:
        first = asyncio.ensure_future(client.complete(about("a")))
        while not client._pace._not_before:  # until the refusal is read
            await asyncio.sleep(0.01)
        await asyncio.gather(first, client.complete(about("b")), client.complete(about("c")))
        await client.close()

    endpoint.behavior = limited
    asyncio.run(staggered(make_client()))
    refused, *others = endpoint.times
    assert len(others) == 3
    assert min(others) - refused >= 0.6


def test_a_date_in_retry_after_is_honored(endpoint, make_client):
    def later(handler, body) -> None:
        handler.error(503, Retry_After=format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True))

    endpoint.script = [later]
    complete(make_client())
    assert endpoint.times[1] - endpoint.times[0] >= 0.9  # a date has whole seconds only


@pytest.mark.parametrize("nonsense", ["-1", "nan", "soon", "Mon, 99 Foo"])
def test_nonsense_in_retry_after_is_passed_over(endpoint, make_client, nonsense):
    endpoint.script = [lambda h, b: h.error(429, Retry_After=nonsense)]
    assert complete(make_client()).requests == 2


def test_a_server_that_asks_for_an_hour_ends_the_run(endpoint, make_client):
    endpoint.behavior = lambda h, b: h.error(429, Retry_After="3600")
    with pytest.raises(EndpointDown, match="3600 s") as failure:
        complete(make_client())
    assert failure.value.passing
    assert len(endpoint.requests) == 1


def test_pauses_grow_and_vary(endpoint, make_client, monkeypatch):
    monkeypatch.setattr("sae_core.labels.pace.FIRST_PAUSE", 0.1)
    monkeypatch.setattr("sae_core.labels.pace.LONGEST_PAUSE", 1.0)
    pauses = []

    async def sleep(seconds: float) -> None:
        pauses.append(seconds)

    monkeypatch.setattr("sae_core.labels.pace.asyncio", SimpleNamespace(sleep=sleep))
    endpoint.script = [lambda h, b: h.error(500)] * 2
    complete(make_client())
    first, second = pauses
    assert 0.05 <= first <= 0.1
    assert 0.1 <= second <= 0.2


def test_the_same_request_asked_at_once_is_bought_once(endpoint, make_client):
    def slow(handler, body) -> None:
        time.sleep(0.1)
        handler.answer("fine")

    endpoint.behavior = slow
    answers = together(make_client(), MESSAGES, MESSAGES, MESSAGES, about("other"))
    assert len(endpoint.requests) == 2
    assert sorted(answer.cached for answer in answers) == [False, False, True, True]


def test_an_answer_keeps_what_it_took_when_it_was_bought(endpoint, make_client):
    details = {"prompt_tokens": 100, "completion_tokens": 20, "prompt_tokens_details": {"cached_tokens": 64}}
    endpoint.script = [lambda h, b: h.error(500)]
    endpoint.behavior = lambda h, b: h.answer("x", usage=details | {"total_tokens": 120})
    bought, kept = complete(make_client()), complete(make_client())
    assert (bought.usage, bought.requests) == (Usage(100, 20, 64), 2)
    assert bought.seconds > 0
    assert datetime.fromisoformat(bought.made_at).tzinfo
    assert kept == bought._replace(cached=True)


def test_a_server_that_does_not_count_tokens_is_taken_to_charge_none(endpoint, make_client):
    endpoint.behavior = lambda h, b: h.answer("x", usage=None)
    assert complete(make_client()).usage == NOTHING


def test_a_bound_of_the_length_by_its_newer_name(endpoint, make_client):
    def newer(handler, body) -> None:
        if "max_tokens" in body:
            handler.error(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead.")
        else:
            handler.answer("fine")

    endpoint.behavior = newer
    complete(make_client(max_tokens=80))
    assert endpoint.requests[-1]["max_completion_tokens"] == 80


@pytest.mark.parametrize("words", ["response_format is not supported", "no support for response format `json_schema`"])
def test_a_server_without_structured_output_is_asked_without_it(endpoint, make_client, words):
    endpoint.behavior = lambda h, b: h.error(400, words) if "response_format" in b else h.answer("fine")
    assert complete(make_client(response_format={"type": "json_schema"}, seed=1)).text == "fine"
    assert endpoint.requests[-1]["seed"] == 1


def limited_to(**limits: float) -> Budget:
    settings = LabelSettings(base_url="http://127.0.0.1/v1", prompt_price=1.0, completion_price=2.0, **limits)
    return Budget(settings, find_prices(settings))


def test_no_more_requests_are_sent_than_allowed_repeats_included(endpoint, make_client):
    endpoint.script = [lambda h, b: h.error(500)]
    budget = limited_to(max_requests=3)
    answers = together(make_client(budget=budget), *(about(letter) for letter in "abcdef"))
    assert len(endpoint.requests) == budget.requests == 3
    assert sum(isinstance(answer, BudgetReached) for answer in answers) == 4


def test_no_request_is_sent_that_might_overrun_the_budget(endpoint, make_client):
    each = (100 * 1.0 + 20 * 2.0) / 1e6  # what the server says it took
    most = (1 + 16 + 2.0 * 20) / 1e6  # a prompt of one byte, and an answer of twenty tokens
    budget = limited_to(max_dollars=2 * each + 0.9 * most)
    client = make_client(budget=budget, max_tokens=20)

    async def one_by_one() -> None:
        try:
            for letter in "abcdef":
                await client.complete(about(letter))
        finally:
            await client.close()

    with pytest.raises(BudgetReached, match=r"labels\.max_dollars"):
        asyncio.run(one_by_one())
    assert budget.dollars == pytest.approx(2 * each)
    assert len(endpoint.requests) == 2


def test_a_server_that_charges_for_an_answer_without_text_is_paid(endpoint, make_client):
    endpoint.behavior = lambda h, b: h.answer("")
    budget = limited_to(max_dollars=1.0)
    with pytest.raises(RequestFailed) as failure:
        complete(make_client(budget=budget))
    assert failure.value.usage == (100, 20, 0)
    assert budget.dollars == pytest.approx(140 / 1e6)


def test_a_cache_that_cannot_be_written_is_said_before_anything_is_paid_for(endpoint, make_client, cache):
    cache.write_text("a file where a folder should be")
    with pytest.raises(ArtifactError, match="MIND_ATLAS_CACHE"):
        complete(make_client())
    assert endpoint.requests == []
