"""The real `openai` package against a real server on loopback."""

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import uvicorn
from fastapi import FastAPI

from sae_core.artifacts import ArtifactStore, Draft, Recipe
from sae_core.atlas import Atlas
from sae_core.dictionary import Dictionary
from sae_core.language_model import LanguageModel
from sae_core.names import Site
from sae_core.serve.live import Live
from sae_core.serve.openai_api import load_presets, openai_api
from sae_core.steers import Steer, SteeringError, parse_steers
from sae_core.studies import Studies
from sae_core.study import ModelSettings

D_SAE, DEAD, PLACES = 16, 5, 24
SITE = Site("tiny-llama", "resid_post", 1, "mini")
STEERED = "tiny-llama+loud"
HELLO = [{"role": "user", "content": "The river"}]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> ArtifactStore:
    store = ArtifactStore(tmp_path_factory.mktemp("atlas"))
    rng = torch.Generator().manual_seed(3)
    W_dec = torch.nn.functional.normalize(torch.randn(D_SAE, 32, generator=rng), dim=1)
    zeros = torch.zeros(D_SAE)
    dictionary = Dictionary(
        W_dec.T.clone(), zeros, W_dec, torch.zeros(32), zeros.clone(), {"architecture": "batch_top_k"}
    )

    def features(draft: Draft) -> dict[str, int]:
        maxima = [0.0 if i == DEAD else 1.0 for i in range(D_SAE)]
        pq.write_table(pa.table({"feature": range(D_SAE), "max_act": maxima}), draft.folder / "features.parquet")
        pq.write_table(pa.table({"feature": [0]}), draft.folder / "examples.parquet")
        return {}

    slug = f"{SITE.slug}.batch_top_k.w{D_SAE}.k4"
    store.make(Recipe("activations", SITE.slug, 1, {"sink_norm": 4.0}), lambda draft: {"median_norm": 1e3})
    store.make(Recipe("dictionary", slug, 1, {}), lambda draft: dictionary.save(draft.folder) or {})
    store.make(Recipe("features", slug, 1, {}), features)
    return store


@pytest.fixture(scope="module")
def lm(tiny_model: Path) -> LanguageModel:
    return LanguageModel.load(ModelSettings(source=str(tiny_model)), precision="float32")


@pytest.fixture(scope="module")
def port(store: ArtifactStore, lm: LanguageModel) -> Iterator[int]:
    atlas, app = Atlas.open(store), FastAPI()
    live = Live(Studies([]), places=PLACES)
    live._model = lambda _: lm  # type: ignore[method-assign]
    app.include_router(openai_api(lambda: atlas, live, {"loud": (Steer(3, 8.0),)}))
    listener = socket.socket()
    listener.bind(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield listener.getsockname()[1]
    server.should_exit = True
    thread.join()
    listener.close()


@pytest.fixture
def client(port: int) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0) as client:
        yield client


def chat(client: openai.OpenAI, model: str = "tiny-llama", **options: Any) -> Any:
    options = {"messages": HELLO, "temperature": 0, "max_tokens": 12} | options
    return client.chat.completions.create(model=model, **options)


def said(answer: Any) -> str:
    return answer.choices[0].message.content


def test_the_model_and_its_steered_presets_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny-llama", STEERED]
    assert client.models.retrieve(STEERED).id == STEERED


def test_an_unmodified_client_chats_with_the_model_as_it_is(client: openai.OpenAI, lm: LanguageModel) -> None:
    answer = chat(client)
    assert said(answer) == "".join(lm.generate(HELLO, 12))
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.prompt_tokens == len(lm.prompt_ids(HELLO))
    assert answer.usage.completion_tokens == 12


def test_a_steered_model_says_what_the_same_steering_in_a_field_says(client: openai.OpenAI) -> None:
    by_name = said(chat(client, STEERED))
    by_field = said(chat(client, extra_body={"steering": [{"feature": 3, "strength": 8.0, "method": "clamp"}]}))
    assert by_name == by_field != said(chat(client))
    nothing = said(chat(client, extra_body={"steering": [], "steering_scope": "generated"}))
    assert nothing == said(chat(client))


def test_a_stream_joins_to_the_answer_in_one_piece(client: openai.OpenAI) -> None:
    options = {"temperature": 0.9, "seed": 5, "logprobs": True}
    whole = chat(client, STEERED, **options)
    chunks = list(chat(client, STEERED, stream=True, stream_options={"include_usage": True}, **options))
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == said(whole)
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == whole.usage
    streamed = [
        entry.logprob for c in chunks if c.choices and c.choices[0].logprobs for entry in c.choices[0].logprobs.content
    ]
    assert streamed == pytest.approx([entry.logprob for entry in whole.choices[0].logprobs.content])
    assert all(logprob < 0 for logprob in streamed)


def test_text_is_completed_whole_and_streamed(client: openai.OpenAI, lm: LanguageModel) -> None:
    options = {"model": "tiny-llama", "prompt": "Rain fell on", "temperature": 0, "max_tokens": 10}
    whole = client.completions.create(**options).choices[0].text
    assert whole == "".join(lm.generate("Rain fell on", 10))
    assert "".join(c.choices[0].text for c in client.completions.create(**options, stream=True)) == whole


def test_stop_texts_and_seeds_are_heeded(client: openai.OpenAI) -> None:
    drawn = {seed: said(chat(client, temperature=1, seed=seed)) for seed in (1, 2)}
    assert drawn[1] == said(chat(client, temperature=1, seed=1)) != drawn[2]
    stop = drawn[1][3:5]
    assert said(chat(client, temperature=1, seed=1, stop=stop)) == drawn[1][: drawn[1].index(stop)]


@pytest.mark.parametrize(
    ("options", "status", "param", "why"),
    [
        ({"model": "gpt-5"}, 404, "model", "does not exist: there are tiny-llama"),
        ({"n": 2}, 400, "n", "'n' is not supported"),
        ({"frequency_penalty": 0.5}, 400, "frequency_penalty", "not supported"),
        ({"response_format": {"type": "json_object"}}, 400, "response_format", "not supported"),
        ({"top_logprobs": 3, "logprobs": True}, 400, "top_logprobs", "not supported"),
        ({"extra_body": {"min_p": 0.1}}, 400, "min_p", "not supported"),
        ({"temperature": -1}, 400, "temperature", "greater than or equal to 0"),
        ({"temperature": "hot"}, 400, "temperature", "number"),
        ({"top_p": 0}, 400, "top_p", "greater than 0"),
        ({"messages": []}, 400, "messages", "at least 1"),
        ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, 400, "messages", "role"),
        ({"messages": [{"role": "user", "content": "a " * 900}]}, 400, None, "exceed the model's context of 512"),
        ({"extra_body": {"steering": [{"feature": 99, "strength": 1}]}}, 400, "steering", "feature 99 does not exist"),
        ({"extra_body": {"steering": [{"feature": DEAD, "strength": 1}]}}, 400, "steering", "is dead"),
        ({"extra_body": {"steering": [{"feature": 1}]}}, 400, "steering", "strength"),
        ({"extra_body": {"steering": [{"feature": 1, "strength": 1, "method": "push"}]}}, 400, "steering", "method"),
        ({"extra_body": {"steering_scope": "some"}}, 400, "steering_scope", "last_turn"),
    ],
    ids=lambda value: str(value)[:40],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_cannot_be_done_is_refused_by_name_in_openais_shape(
    client: openai.OpenAI, options: dict[str, Any], status: int, param: str | None, why: str, stream: bool
) -> None:
    with pytest.raises(openai.APIStatusError) as refused:
        chat(client, **{"stream": stream} | options)
    assert refused.value.status_code == status
    assert (refused.value.param or "").split(".")[0] == (param or "")
    assert why in refused.value.body["message"]
    assert refused.value.body["type"] == "invalid_request_error"
    assert said(chat(client))  # the next one is served


def test_an_empty_prompt_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="the prompt is empty"):
        client.completions.create(model="tiny-llama", prompt="")


def test_parameters_that_ask_for_nothing_are_let_through(client: openai.OpenAI) -> None:
    neutral = {"n": 1, "frequency_penalty": 0, "presence_penalty": 0, "user": "me", "seed": None, "tools": []}
    assert said(chat(client, **neutral)) == said(chat(client))


@pytest.mark.parametrize("body", ["{", "[]", "null", '"hi"', "{'model': 1}", "\0", "[" * 100_000, "{}"])
def test_a_body_that_is_no_request_is_refused(port: int, body: str) -> None:
    status, answer = post(port, body)
    assert status == 400
    assert answer["error"]["type"] == "invalid_request_error"


def test_what_is_not_served_says_so(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="embeddings is not served here"):
        client.embeddings.create(model="tiny-llama", input="x")


def test_absurd_strengths_are_allowed_and_said(client: openai.OpenAI) -> None:
    answer = chat(client, extra_body={"steering": [{"feature": 3, "strength": 1e6}]})
    assert "degenerate" in answer.notes[0]


def post(port: int, body: str) -> tuple[int, Any]:
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("POST", "/v1/chat/completions", body)
    answer = connection.getresponse()
    read = answer.status, json.loads(answer.read())
    connection.close()
    return read


def test_a_client_that_hangs_up_stops_the_generation_within_a_token(
    client: openai.OpenAI, port: int, lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = []
    forward = lm.model.forward

    def slow(*args: Any, **kwargs: Any) -> Any:
        time.sleep(0.02)
        steps.append(1)
        return forward(*args, **kwargs)

    monkeypatch.setattr(lm.model, "forward", slow)
    body = {"model": "tiny-llama", "messages": HELLO, "max_tokens": 400, "temperature": 2, "logit_bias": {}}
    for stream, first_byte in ((True, True), (True, False), (False, False)):
        connection = http.client.HTTPConnection("127.0.0.1", port)
        connection.request("POST", "/v1/chat/completions", json.dumps(body | {"stream": stream}))
        if first_byte:
            answer = connection.getresponse()
            assert answer.readline().startswith(b"data:")
            answer.close()  # which holds the socket, too
        elif not stream:
            time.sleep(0.2)
        connection.close()
        before = len(steps)
        time.sleep(0.5)
        while len(steps) > before:  # until half a second goes by without a step
            before = len(steps)
            time.sleep(0.5)
    assert len(steps) < 200  # of 1200


def test_twenty_clients_at_once_are_all_served_and_none_waits_for_anothers_end(
    client: openai.OpenAI, lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    alone = said(chat(client, STEERED, max_tokens=20))
    go, forward = threading.Event(), lm.model.forward
    finished: list[int] = []

    def held(*args: Any, **kwargs: Any) -> Any:
        go.wait(60)
        return forward(*args, **kwargs)

    def ask(number: int) -> str:
        text = said(chat(client, STEERED, max_tokens=150 if number == 0 else 20))
        finished.append(number)
        return text

    monkeypatch.setattr(lm.model, "forward", held)
    with ThreadPoolExecutor(20) as pool:
        first = pool.submit(ask, 0)
        others = [pool.submit(ask, number) for number in range(1, 20)]
        time.sleep(1)  # all are in
        go.set()
        assert all(other.result() == alone for other in others)
    assert first.result().startswith(alone)
    assert finished[-1] == 0  # the longest, which came first, held up nobody


def test_more_than_the_places_are_told_to_come_back(
    client: openai.OpenAI, lm: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, forward = threading.Event(), lm.model.forward

    def held(*args: Any, **kwargs: Any) -> Any:
        go.wait(60)
        return forward(*args, **kwargs)

    monkeypatch.setattr(lm.model, "forward", held)

    refused = []

    def ask(_: int) -> int:
        try:
            chat(client, max_tokens=2)
        except openai.InternalServerError as error:
            refused.append((error.response.headers["retry-after"], error.body["code"]))
            go.set()
            return error.status_code
        return 200

    with ThreadPoolExecutor(PLACES + 6) as pool:
        answers = list(pool.map(ask, range(PLACES + 6)))
    assert 503 in answers
    assert set(refused) == {("2", "overloaded")}
    assert answers.count(200) >= PLACES
    assert said(chat(client))


def test_presets_are_lines_of_a_file(tmp_path: Path) -> None:
    assert load_presets(tmp_path) == {}
    (tmp_path / "steered.toml").write_text('golden-gate = "1234:10"\ncalm = "9:-2:add, 10:0.5"\n', "utf-8")
    presets = load_presets(tmp_path)
    assert presets == {"golden-gate": (Steer(1234, 10.0),), "calm": (Steer(9, -2.0, "add"), Steer(10, 0.5))}
    for wrong in ("golden-gate = 3", "golden gate", 'x = "a:b"', 'x = "1"'):
        (tmp_path / "steered.toml").write_text(wrong, "utf-8")
        with pytest.raises(SteeringError, match=r"steered\.toml: .*write"):
            load_presets(tmp_path)
    assert parse_steers("1:2") == (Steer(1, 2.0),)
