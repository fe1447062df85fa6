"""Why this token: the API's answers beside the library's own, and what it refuses."""

from typing import Any

import pytest
from starlette.testclient import TestClient

from sae_core.atlas import Atlas
from sae_core.circuits.attribution import Change, Trace
from sae_core.prompt_reader import PromptReader

PROMPT = "The old bridge rose over"


@pytest.fixture(scope="module")
def reader(client: TestClient, atlas: Atlas) -> PromptReader:
    """Of the served model, which the first question loads."""
    assert client.post("/api/text", json={"text": "The"}).status_code == 200
    return client.app.state.live.reader(atlas)  # type: ignore[attr-defined]


def ask(client: TestClient, path: str = "/api/why", **asked: Any) -> dict[str, Any]:
    answer = client.post(path, json={"prompt": PROMPT} | asked)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_an_answer_adds_up_and_its_ablations_are_real(client: TestClient, atlas: Atlas, reader: PromptReader):
    why = ask(client, limit=4)["why"]
    trace = Trace(reader, PROMPT)
    found = trace.attribute()
    parts = why["base"] + why["of_features"] + why["of_error"] + why["rest"]
    assert parts == pytest.approx(why["difference"], abs=1e-4)
    assert parts == pytest.approx(found.difference, abs=1e-4)
    assert [token["token"] for token in why["tokens"]] == found.tokens
    assert sum(token["features"] for token in why["tokens"]) == pytest.approx(why["of_features"], abs=1e-4)
    assert len(why["causes"]) == 4
    for cause in why["causes"]:
        without = trace.changed([Change(cause["feature"], 0.0, cause["position"])])
        left = float(without[found.target.id] - without[found.against.id])
        assert cause["ablation"] == pytest.approx(found.difference - left, abs=1e-4)
        assert cause["label"] == atlas.name(cause["feature"])


def test_two_prompts_are_asked_about_the_same_two_tokens(client: TestClient):
    told = ask(client, compare="The old river rose over the")
    one, other = told["why"], told["compared"]
    assert (one["target"]["token"], one["against"]["token"]) == (other["target"]["token"], other["against"]["token"])
    assert 0 < len(told["features"]) <= 10
    assert ask(client)["compared"] is None


def test_a_feature_that_is_held_changes_what_follows(client: TestClient, reader: PromptReader, atlas: Atlas):
    cause = ask(client)["why"]["causes"][0]
    held = {"feature": cause["feature"], "strength": 2.0, "position": cause["position"]}
    told = ask(client, "/api/why/next", held=[held])
    trace = Trace(reader, PROMPT)
    act = 2 * atlas.features.feature(cause["feature"]).max_act
    after = trace.changed([Change(cause["feature"], act, cause["position"])]).softmax(0)
    assert [t["after"] for t in told["tokens"]] == sorted((t["after"] for t in told["tokens"]), reverse=True)
    assert told["tokens"][0]["after"] == pytest.approx(float(after.max()), rel=1e-3)
    assert told["before"] != told["after"]
    plain = ask(client, "/api/why/next")
    assert plain["before"] == pytest.approx(plain["after"], abs=1e-4)
    assert all(t["before"] == pytest.approx(t["after"], abs=1e-4) for t in plain["tokens"])


@pytest.mark.parametrize(
    ("path", "asked", "status", "why"),
    [
        ("/api/why", {"prompt": ""}, 422, "at least 1"),
        ("/api/why", {"prompt": "a" * 2001}, 422, "at most 2000"),
        ("/api/why", {"prompt": "a b " * 400}, 400, "exceed the model's context"),
        ("/api/why", {"target": " the", "against": " the"}, 400, "both begin with the token"),
        ("/api/why", {"limit": 31}, 422, "less than or equal to 30"),
        ("/api/why", {"steps": 1000}, 422, "less than or equal to 32"),
        ("/api/why", {"dictionary": "none"}, 404, "no finished dictionary"),
        ("/api/why/next", {"held": [{"feature": 64}]}, 400, "no feature 64"),
        ("/api/why/next", {"held": [{"feature": 1, "position": 99}]}, 400, "no token 99"),
        ("/api/why/next", {"held": [{"feature": 1}, {"feature": 1}]}, 400, "changed twice"),
        ("/api/why/next", {"held": [{"feature": 1}] * 17}, 422, "at most 16"),
    ],
)
def test_what_cannot_be_answered_is_refused_in_one_line(
    client: TestClient, path: str, asked: dict[str, Any], status: int, why: str
):
    answer = client.post(path, json={"prompt": PROMPT} | asked)
    assert answer.status_code == status
    assert why in answer.json()["detail"]


def test_the_page_says_what_to_do_without_javascript(client: TestClient):
    page = client.get("/why")
    assert page.status_code == 200
    assert "mind-atlas why" in page.text
