"""The JSON of what was made on request, and of a contrast."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fastapi.testclient import TestClient

from assets.partitions import STUDIES
from sae_core.artifacts import ArtifactStore
from sae_core.atlas import Atlas
from sae_core.language_model import LanguageModel
from sae_core.safety.behaviors import build_behaviors, load_behaviors
from sae_core.serve import create_app
from sae_core.serve.contrast import MAX_ALL, MAX_PROMPTS
from sae_core.steering_texts import Subject
from sae_core.studies import Studies, study_folders
from sae_core.study import BehaviorSettings

CODE = [f"def f{i}(a, b): return {i}" for i in range(90)]
PROSE = [f"The bridge crosses river {i}." for i in range(90)]


@pytest.fixture(scope="module")
def reported(reported_atlas: Path) -> TestClient:
    app = create_app(ArtifactStore(reported_atlas), studies=Studies.load(*study_folders()))
    return TestClient(app, base_url="http://127.0.0.1")


def test_the_audit_is_told_whole(reported: TestClient):
    told = reported.get("/api/audit").json()
    assert [concept["concept"] for concept in told["concepts"]] == ["citation_surnames", "power_seeking"]
    found = told["concepts"][0]
    assert found["verdict"]
    assert 0 <= found["probe"]["low"] <= found["probe"]["auc"] <= found["probe"]["high"] <= 1
    assert found["candidates"][0]["specificity"]["corpus"] < 1
    assert "silent proves nothing" in told["caveats"]


def test_a_shared_feature_has_an_activation_on_each_token_of_each_language(reported: TestClient):
    (text,) = reported.get("/api/multilingual").json()["texts"]
    assert text["languages"] == ["en", "fr", "ru"]
    best = text["features"][0]
    assert [x["language"] for x in best["examples"][0]] == text["languages"]
    for example in (x for item in best["examples"] for x in item):
        assert len(example["tokens"]) == len(example["acts"])
    assert any(act > 0 for example in best["examples"][0] for act in example["acts"])


@pytest.mark.parametrize("address", ["/api/audit", "/api/multilingual", "/api/behaviors"])
def test_what_was_not_made_says_which_command_makes_it(client: TestClient, address: str):
    answer = client.get(address)
    assert answer.status_code == 404
    assert "run `mind-atlas " in answer.json()["detail"]
    assert "Audit</a>" not in client.get("/").text


def test_each_change_of_a_behavior_is_told_with_its_controls(
    reported_atlas: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    root = Path(shutil.copytree(reported_atlas, tmp_path / "atlas"))
    store = ArtifactStore(root)
    atlas = Atlas.open(store)
    order = STUDIES.order(atlas.dictionary, "tiny")
    short = [b.model_copy(update={"items": b.items[:3]}) for b in load_behaviors()]
    monkeypatch.setattr("sae_core.safety.behaviors.load_behaviors", lambda: short)
    live = int(np.argmax(atlas.features.table()["max_act"].to_numpy()))
    candidates = [{"concept": b.concept, "candidates": [{"feature": live}]} for b in short]
    (tmp_path / "audit.json").write_text(json.dumps(candidates), "utf-8")
    subject = Subject.of(atlas, LanguageModel.load(order.study.model, precision="float32"))
    settings = BehaviorSettings(features=1, controls=2)
    store.make(
        order.recipe("behaviors", atlas.dictionary),
        lambda draft: build_behaviors(settings, subject, tmp_path, draft.folder),
    )
    client = TestClient(create_app(store, studies=Studies.load(*study_folders())), base_url="http://127.0.0.1")
    told = client.get("/api/behaviors").json()
    assert [b["name"] for b in told["behaviors"]] == [b.name for b in short]
    assert {e["change"] for e in told["effects"] if e["by"] == "feature"} == {"down", "ablated", "up"}
    shown = client.get("/audit").text
    (b, *_), up = told["behaviors"], next(e for e in told["effects"] if (e["by"], e["change"]) == ("feature", "up"))
    assert b["description"] in shown
    assert f"{up['shift']:+.2f}" in shown


def test_a_feature_that_the_report_does_not_show_is_not_found(reported: TestClient):
    assert reported.get("/multilingual?feature=999").status_code == 404
    assert reported.get("/multilingual?text=songs").status_code == 404


def test_a_contrast_says_what_was_shown_and_what_was_left_out(reported: TestClient):
    asked = {"positive": [*CODE, CODE[0], "both"], "negative": [*PROSE, "both"], "limit": 3}
    told = reported.post("/api/contrast", json=asked).json()
    assert told["duplicates"] == 3
    assert told["prompts"] == {"find_positive": 45, "find_negative": 45, "test_positive": 45, "test_negative": 45}
    assert len(told["features"]) == 3
    best = told["features"][0]
    assert best["auc"] > 0.8
    assert best["low"] <= best["auc"] <= best["high"]
    assert f"feature {best['feature']} tells unseen prompts of these two kinds apart" in told["claim"]
    by_hand = reported.post("/api/contrast", json=asked | {"by": "probe"}).json()
    assert len(by_hand["near"]) == 3
    assert not by_hand["features"]


@pytest.mark.parametrize(
    ("asked", "status", "why"),
    [
        ({"positive": [], "negative": ["a"]}, 422, "at least 1"),
        ({"positive": ["a"], "negative": ["a"]}, 400, "no positive prompts"),
        ({"positive": [" "], "negative": ["a"]}, 400, "no positive prompts (there is none)"),
        ({"positive": ["a"] * (MAX_PROMPTS + 1), "negative": ["b"]}, 422, "at most 200"),
        ({"positive": ["a" * 3000] * 14, "negative": ["b"]}, 413, f"at most {MAX_ALL:,}"),
        ({"positive": ["a"], "negative": ["b"], "by": "eye"}, 422, "activations"),
        ({"positive": ["a"], "negative": ["b"], "dictionary": "none"}, 404, "no finished dictionary"),
    ],
)  # fmt: skip
def test_prompts_that_cannot_be_compared_are_refused(
    reported: TestClient, asked: dict[str, Any], status: int, why: str
):
    answer = reported.post("/api/contrast", json=asked)
    assert answer.status_code == status
    assert why in answer.json()["detail"]


def test_a_form_of_any_bytes_is_answered_as_a_page(reported: TestClient):
    for body in (b"", b"positive=%ff%fe&negative=x", b"\xff\x00=1", b"positive=a&positive=b&negative=" + b"x%0A" * 300):
        answer = reported.post("/contrast", content=body, headers={"Content-Type": "application/x-www-form-urlencoded"})
        assert answer.status_code in (200, 400), body
        assert "<h1>" in answer.text
