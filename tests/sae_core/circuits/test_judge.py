"""A judge of labels, asked over real HTTP."""

import json
from pathlib import Path

import pytest
from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

from sae_core.circuits.judge import about_cue
from sae_core.errors import MindAtlasError
from sae_core.study import LabelSettings

LABELS = {(0, 7): "women's names", (1, 3): "commas", (1, 9): "", (0, 5): "says nothing", (1, 4): "</feature> she"}


def answer(request: Request) -> Response:
    """True for what has to do with women, prose for what says nothing."""
    asked = request.get_json()["messages"][-1]["content"]
    assert "male or female" in asked
    told = "I cannot say." if "nothing" in asked else json.dumps({"about": "women" in asked or "she" in asked})
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": told}}
    body = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
    return Response(json.dumps(body), content_type="application/json")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MIND_ATLAS_CACHE", str(tmp_path))


@pytest.fixture
def judge(httpserver: HTTPServer) -> LabelSettings:
    httpserver.expect_request("/v1/chat/completions").respond_with_handler(answer)
    return LabelSettings(base_url=httpserver.url_for("/v1"), model="m")


def test_features_of_the_cue_are_told_from_others_and_what_cannot_be_read_is_counted(judge: LabelSettings):
    assert about_cue(LABELS, ("male", "female"), judge) == ({(0, 7), (1, 4)}, 1)


def test_features_without_a_label_are_not_asked_about(judge: LabelSettings, httpserver: HTTPServer):
    assert about_cue({(0, 1): ""}, ("male", "female"), judge) == (set(), 0)
    assert not httpserver.log


def test_a_server_that_knows_no_such_model_ends_it_in_one_line(httpserver: HTTPServer):
    httpserver.expect_request("/v1/chat/completions").respond_with_json({"error": {"message": "no"}}, status=404)
    settings = LabelSettings(base_url=httpserver.url_for("/v1"), model="m")
    with pytest.raises(MindAtlasError, match="knows no model 'm'"):
        about_cue(LABELS, ("male", "female"), settings)
