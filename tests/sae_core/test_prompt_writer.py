import json
from pathlib import Path

import pytest
from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

from sae_core.prompt_reader import PromptError
from sae_core.prompt_writer import FORMS, read_answer, write_prompts
from sae_core.study import LabelSettings


@pytest.fixture
def writer(httpserver: HTTPServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> LabelSettings:
    """A server that writes two prompts about owls or mice, one of them twice; and nothing to read when asked badly."""
    monkeypatch.setenv("MIND_ATLAS_CACHE", str(tmp_path))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")

    def answer(request: Request) -> Response:
        asked = request.get_json()["messages"][0]["content"]
        word = "mouse" if "nothing to do with" in asked else "owl"
        form = next(i for i, form in enumerate(FORMS) if form in asked)
        told = "no JSON" if "silence" in asked else json.dumps({"prompts": [f"An  {word}\n{form}.", f"The {word}.", 5]})
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": told}}
        body = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
        return Response(json.dumps(body), content_type="application/json")

    httpserver.expect_request("/v1/chat/completions").respond_with_handler(answer)
    return LabelSettings(base_url=httpserver.url_for("/v1"), model="m")


def test_both_sides_are_written_in_many_forms_each_prompt_once(writer: LabelSettings) -> None:
    positive, negative = write_prompts(writer, "texts about owls", 30, "key")
    assert positive == ["An owl 0.", "The owl.", "An owl 1.", "An owl 2."]
    assert negative == [line.replace("owl", "mouse") for line in positive]
    assert write_prompts(writer, "texts about owls", 20, "key")[0] == ["An owl 0.", "The owl.", "An owl 1."]


def test_a_description_of_nothing_and_a_writer_of_no_json_are_refused(writer: LabelSettings) -> None:
    with pytest.raises(PromptError, match="the description is empty"):
        write_prompts(writer, " ", 10, "key")
    with pytest.raises(PromptError, match="m wrote no positive prompts that can be read"):
        write_prompts(writer, "silence", 10, "key")


@pytest.mark.parametrize("text", ["", "{", '["a"]', '{"prompts": "a"}', '{"prompts": [" ", 1, null]}', "[" * 9999])
def test_an_answer_of_another_shape_holds_no_prompts(text: str) -> None:
    assert read_answer(text) == []


def test_an_answer_may_stand_among_words() -> None:
    assert read_answer('Here: ```{"prompts": ["a b", "c"]}``` done') == ["a b", "c"]
