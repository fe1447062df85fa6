"""The steering page's own routes, on the tiny study's atlas."""

import json
from typing import Any

import pytest
from starlette.testclient import TestClient

from sae_core.atlas import Atlas
from sae_core.serve.steer import instruction, suggested
from sae_core.steers import Steer


@pytest.fixture(scope="module")
def alive(atlas: Atlas) -> int:
    return next(row["feature"] for row in atlas.features.table().to_pylist() if not row["is_dead"])


def _is_word(token: str) -> bool:
    return len(token.strip()) > 1 and token.strip().isalpha()


def events(client: TestClient, **asked: Any) -> list[dict[str, Any]]:
    answer = client.post("/api/steer", json={"prompt": "The river", "max_tokens": 6} | asked)
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    return [json.loads(line.removeprefix("data: ")) for line in answer.text.split("\n\n") if line]


def text(told: list[dict[str, Any]], column: str) -> str:
    return "".join(event["text"] for event in told if event.get("column") == column)


def test_three_columns_come_a_token_of_each_in_turn(client: TestClient, alive: int):
    told = events(client, steering=[{"feature": alive, "strength": 50}])
    assert told[0]["start"] == ["default", "steered", "words"]
    assert [event["column"] for event in told[1:7]] == ["default", "steered", "words"] * 2
    assert all(event["logprob"] <= 0 and len(event["before"]) == 1 for event in told[1:])
    assert "degenerate" in told[0]["notes"][0]
    assert text(told, "default") != text(told, "steered")
    assert text(told, "default") == text(events(client), "default") == text(events(client), "steered")


def test_a_strength_is_looked_for_where_none_was_yet(client: TestClient, atlas: Atlas):
    rows = atlas.features.table().to_pylist()
    feature = next(r["feature"] for r in rows if not r["is_dead"] and atlas.suggested_strength(r["feature"]) is None)
    before = client.get(f"/api/steer/{atlas.dictionary}/{feature}").json()
    found = client.post(f"/api/steer/{atlas.dictionary}/{feature}/strength").json()
    assert (before["suggested_strength"], before["strength"]) == (None, 2)
    assert found["suggested_strength"] in (0, 0.5, 1, 1.5, 2, 3, 4)
    assert found["strength"] == (found["suggested_strength"] or 2)
    dead = next((r["feature"] for r in rows if r["is_dead"]), None)
    for other, status in ((dead, 400), (64, 404)):
        if other is not None:
            assert client.post(f"/api/steer/{atlas.dictionary}/{other}/strength").status_code == status


def test_what_a_feature_has_on_a_token_is_what_the_text_page_says(client: TestClient, atlas: Atlas, alive: int):
    told = events(client, steering=[{"feature": alive, "strength": 0, "method": "add"}], max_tokens=20)
    values = [event["before"][0] for event in told if event.get("column") == "default"]
    steered = [event["before"][0] for event in told if event.get("column") == "steered"]
    assert values == pytest.approx(steered)
    assert all(value >= 0 for value in values)


@pytest.mark.parametrize(
    ("asked", "status", "why"),
    [
        ({"prompt": ""}, 422, "at least 1"),
        ({"prompt": "a" * 4001}, 422, "at most 4000"),
        ({"prompt": "a b " * 900}, 400, "exceed the model's context"),
        ({"steering": [{"feature": 64, "strength": 1}]}, 400, "feature 64 does not exist"),
        ({"steering": [{"feature": -1, "strength": 1}]}, 400, "feature -1 does not exist"),
        ({"steering": [{"feature": 1, "strength": 1}, {"feature": 1, "strength": 2}]}, 400, "twice"),
        ({"steering": [{"feature": 1, "strength": -1, "method": "min_clamp"}]}, 400, "changes nothing"),
        ({"steering": [{"feature": 1, "strength": 1}] * 17}, 422, "at most 16"),
        ({"scope": "some"}, 422, "scope"),
        ({"max_tokens": 0}, 422, "max_tokens"),
        ({"temperature": -1}, 422, "temperature"),
        ({"dictionary": "none"}, 404, "no finished dictionary"),
        ({"steer": []}, 422, "steer"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_what_cannot_be_steered_is_refused_in_one_line(
    client: TestClient, asked: dict[str, Any], status: int, why: str
):
    answer = client.post("/api/steer", json={"prompt": "The river", "max_tokens": 2} | asked)
    assert answer.status_code == status
    assert why in answer.json()["detail"]


@pytest.mark.parametrize("body", ["{", "[]", '{"prompt": "a", "steering": [{"feature": 1, "strength": NaN}]}'])
def test_a_body_that_is_no_question_is_refused(client: TestClient, body: str):
    answer = client.post("/api/steer", content=body, headers={"content-type": "application/json"})
    assert answer.status_code in (400, 422)
    assert answer.json()["detail"]


def test_the_models_of_openais_api_are_those_of_the_atlas(client: TestClient, atlas: Atlas):
    assert client.get("/v1/models").json()["data"][0]["id"] == atlas.site.model
    asked = {"model": atlas.site.model, "messages": [{"role": "user", "content": "The river"}], "max_tokens": 6}
    said = client.post("/v1/chat/completions", json=asked | {"temperature": 0}).json()
    assert said["choices"][0]["message"]["content"] == text(events(client), "default")


def test_one_model_is_loaded_for_texts_the_page_and_openais_api(client: TestClient, atlas: Atlas):
    live = client.app.state.live  # type: ignore[attr-defined]
    events(client)
    loaded = live._loaded
    client.post("/api/text", json={"text": "The old bridge"})
    client.post("/v1/completions", json={"model": atlas.site.model, "prompt": "The", "max_tokens": 1})
    assert live._loaded is loaded is not None


def test_words_ask_for_what_is_turned_up_and_nothing_else(atlas: Atlas):
    row = next(r for r in atlas.features.table().to_pylist() if any(map(_is_word, r["top_tokens"])))
    word = next(filter(_is_word, row["top_tokens"])).strip()
    up, down, halved = Steer(row["feature"], 2.0), Steer(2, -1.0), Steer(3, 0.5, "scale")
    assert instruction(atlas, [down, halved]) == ""
    asked = instruction(atlas, [up, down])
    assert asked == instruction(atlas, [up])
    assert word in asked


def test_presets_are_the_features_of_the_best_scores_with_a_strength(atlas: Atlas):
    found = [steers[0] for steers in suggested(atlas).values()]
    scores = [atlas.feature(steer.feature).steering for steer in found]
    assert [row["output_score"] for row in scores] == sorted((row["output_score"] for row in scores), reverse=True)
    assert [row["suggested_strength"] for row in scores] == [steer.strength for steer in found]
