"""The monitor over real HTTP: the same alerts whole, streamed and by the library; bounds, and clients that go away."""

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI

from sae_core.artifacts import ArtifactStore
from sae_core.atlas import Atlas
from sae_core.language_model import LanguageModel
from sae_core.prompt_reader import PromptReader
from sae_core.safety.monitor import Monitor, Stream, detectors_of
from sae_core.serve import create_app
from sae_core.serve.turns import Turns
from sae_core.studies import Studies, study_folders
from sae_core.study import ModelSettings

TEXT = "The minister seized control of every council. (Abbott & Bianchi, 1999) " * 4
PLACES = 3


@pytest.fixture(scope="module")
def app(reported_atlas: Path) -> FastAPI:
    app = create_app(ArtifactStore(reported_atlas), studies=Studies.load(*study_folders()))
    app.state.live._turns, app.state.live.seconds = Turns(PLACES), 300
    return app


@pytest.fixture(scope="module")
def port(app: FastAPI) -> Iterator[int]:
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield listener.getsockname()[1]
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def monitor(reported_atlas: Path, tiny_model: Path) -> Monitor:
    atlas = Atlas.open(ArtifactStore(reported_atlas))
    lm = LanguageModel.load(ModelSettings(source=str(tiny_model)), precision="float32")
    return Monitor(PromptReader.of(atlas, lm), detectors_of(atlas), 0.3)


def ask(port: int, body: Any) -> tuple[int, str, str]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    text = body if isinstance(body, str) else json.dumps({"false_positive_rate": 0.3} | body)
    connection.request("POST", "/v1/monitor", text, {"Content-Type": "application/json"})
    answer = connection.getresponse()
    return answer.status, answer.headers["content-type"], answer.read().decode()


def places(alerts: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    return sorted((a["concept"], a["feature"], a["start"], a["stop"]) for a in alerts)


def test_a_text_whole_streamed_and_by_the_library_raises_the_same_alerts(port: int, monitor: Monitor) -> None:
    expected = [asdict(alert) for alert in monitor.scan([TEXT])[0]]
    assert expected
    status, kind, text = ask(port, {"text": TEXT})
    whole = json.loads(text)
    assert (status, kind) == (200, "application/json")
    assert places(whole["alerts"]) == places(expected)
    status, kind, text = ask(port, {"text": TEXT, "stream": True})
    *alerts, last = map(json.loads, text.splitlines())
    assert (status, kind) == (200, "application/x-ndjson")
    assert places(alerts) == places(expected)
    assert last["end"] == {key: whole[key] for key in ("dictionary", "tokens", "windows")}
    assert whole["windows"] == len(monitor.reader.windows([TEXT])) > 1
    values = {(a["concept"], a["start"]): a for a in alerts}
    for alert in expected:
        told = values[alert["concept"], alert["start"]]
        assert told["value"] == pytest.approx(alert["value"], rel=1e-3)
        assert told["probability"] == pytest.approx(alert["probability"], rel=1e-2)
        assert told["threshold"] == pytest.approx(alert["threshold"])


def test_a_conversation_is_read_as_the_model_is_given_it(port: int, monitor: Monitor) -> None:
    messages = [
        {"role": "user", "content": TEXT[:60]},
        {"role": "assistant", "content": [{"type": "text", "text": "Yes."}]},
    ]
    text = f"<|start|>user\n{TEXT[:60]}<|end|>\n<|start|>assistant\nYes.<|end|>\n"
    status, _, answer = ask(port, {"messages": messages})
    assert status == 200
    assert places(json.loads(answer)["alerts"]) == places([asdict(a) for a in monitor.scan([text])[0]])


def test_only_the_concepts_asked_for_are_watched(port: int) -> None:
    told = json.loads(ask(port, {"text": TEXT, "concepts": ["power_seeking"], "false_positive_rate": 0.9})[2])
    assert {alert["concept"] for alert in told["alerts"]} == {"power_seeking"}


@pytest.mark.parametrize(
    ("body", "status", "why", "param"),
    [
        ("no json", 400, "JSON", None),
        ("[]", 400, "valid dictionary", None),
        ({}, 400, "give either text or messages", None),
        ({"text": "a", "messages": [{"role": "user", "content": "a"}]}, 400, "either text or messages", None),
        ({"text": ""}, 400, "holds no token", None),
        ({"text": "a" * 4001}, 413, "4,001 characters: give at most 4,000", "text"),
        ({"messages": [{"role": "user", "content": "a" * 3000}] * 2}, 413, "6,000 characters", "messages"),
        ({"messages": []}, 400, "at least 1", "messages"),
        ({"messages": [{"role": "cat", "content": "a"}]}, 400, "role", "messages.0.role"),
        ({"text": "a", "txt": "b"}, 400, "Extra inputs", "txt"),
        ({"text": "a", "concepts": ["owls"]}, 400, "no monitor for 'owls'", None),
        ({"text": "a", "false_positive_rate": 1}, 400, "less than 1", "false_positive_rate"),
        ({"text": "a", "false_positive_rate": 0.001}, 400, "cannot hold a false-positive rate of 0.001", None),
        ({"text": "a", "base_rate": 0}, 400, "greater than 0", "base_rate"),
        ({"text": "a", "dictionary": "none"}, 404, "no finished dictionary", None),
        ({"text": "", "stream": True}, 400, "holds no token", None),
    ],
)  # fmt: skip
def test_what_cannot_be_watched_is_refused_in_openais_shape(
    port: int, body: Any, status: int, why: str, param: str | None
) -> None:
    found, kind, text = ask(port, body)
    error = json.loads(text)["error"]
    assert (found, kind, error["type"]) == (status, "application/json", "invalid_request_error")
    assert why in error["message"]
    assert error["param"] == param


def test_without_an_audit_the_cure_is_told(tiny_atlas: Path) -> None:
    from starlette.testclient import TestClient

    app = create_app(ArtifactStore(tiny_atlas), studies=Studies.load(*study_folders()))
    answer = TestClient(app, base_url="http://127.0.0.1").post("/v1/monitor", json={"text": "a"})
    assert answer.status_code == 404
    assert "`mind-atlas audit` does" in answer.json()["error"]["message"]


def test_the_description_of_the_api_holds_it(app: FastAPI) -> None:
    described = app.openapi()
    route = described["paths"]["/v1/monitor"]["post"]
    assert set(route["responses"]) == {"200", "4XX", "5XX"}
    assert set(route["responses"]["200"]["content"]) == {"application/json", "application/x-ndjson"}
    fields = described["components"]["schemas"]["MonitorQuestion"]["properties"]
    assert {"text", "messages", "concepts", "false_positive_rate", "base_rate", "stream"} <= set(fields)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Until it is set, every piece of a text takes a tenth of a second and is followed by another."""
    go, push = threading.Event(), Stream.push

    def slow(self: Stream, ids: Any) -> Any:
        if not go.is_set():
            time.sleep(0.1)
        return push(self, ids)

    monkeypatch.setattr(Stream, "push", slow)
    yield go
    go.set()


def test_more_than_the_places_are_told_to_come_back_and_the_others_are_served(
    port: int, app: FastAPI, held: threading.Event
) -> None:
    with ThreadPoolExecutor(PLACES) as clients:
        served = [clients.submit(ask, port, {"text": TEXT * 12}) for _ in range(PLACES)]
        until(lambda: len(app.state.live._turns._inside) == PLACES)
        status, _, text = ask(port, {"text": "a"})
        held.set()
        assert [one.result()[0] for one in served] == [200] * PLACES
    assert status == 503
    assert json.loads(text)["error"] == json.loads(text)["error"] | {"type": "server_error", "code": "overloaded"}


def test_a_client_that_hangs_up_frees_its_place(port: int, app: FastAPI, held: threading.Event) -> None:
    for stream in (True, False):
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
        body = json.dumps({"text": TEXT * 12, "false_positive_rate": 0.3, "stream": stream})
        connection.request("POST", "/v1/monitor", body, {"Content-Type": "application/json"})
        until(lambda: len(app.state.live._turns._inside) == 1)
        connection.close()
        until(lambda: not app.state.live._turns._inside)


def test_a_text_that_takes_too_long_is_given_up(
    port: int, app: FastAPI, held: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(app.state.live, "seconds", 0.3)
    status, _, text = ask(port, {"text": TEXT * 12})
    assert status == 504
    assert "no answer within 0.3 s" in json.loads(text)["error"]["message"]
    *_, last = map(json.loads, ask(port, {"text": TEXT * 12, "stream": True})[2].splitlines())
    assert "no answer within" in last["error"]["message"]


def until(condition: Any) -> None:
    for _ in range(500):
        if condition():
            return
        time.sleep(0.02)
    raise AssertionError("it never came to that")
