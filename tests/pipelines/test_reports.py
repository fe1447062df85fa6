import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from pipelines.reports import insert, show_report, watch
from sae_core.artifacts import ArtifactStore, Made, Recipe
from sae_core.errors import MindAtlasError
from sae_core.safety.monitor import Monitor
from sae_core.safety.shapes import Alert


@pytest.fixture
def made(tmp_path: Path) -> Made:
    def build(draft) -> dict:
        (draft.folder / "audit.md").write_text("| the | table |\n", "utf-8")
        (draft.folder / "audit.json").write_text("[1]", "utf-8")
        (draft.folder / "monitor.json").write_text("[2]", "utf-8")
        return {"found": 1}

    return ArtifactStore(tmp_path / "store").make(Recipe("safety", "some.slug", 1, {}), build)


def test_a_report_goes_between_its_marks_and_again_takes_the_place_of_the_old(made: Made, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- safety -->\nold\n<!-- /safety -->\nafter\n", "utf-8")
    for _ in range(2):
        insert(made, page)
        expected = "before\n<!-- safety -->\n| the | table |\n<!-- /safety -->\nafter\n"
        assert page.read_text("utf-8") == expected


@pytest.mark.parametrize("content", [None, "nothing here", "<!-- safety --> and no end"])
def test_a_page_without_marks_is_refused_and_left_alone(made: Made, tmp_path: Path, content: str | None) -> None:
    page = tmp_path / "page.md"
    if content is not None:
        page.write_text(content, "utf-8")
    with pytest.raises(MindAtlasError, match=r"page\.md has no lines <!-- safety -->"):
        insert(made, page)
    assert content is None or page.read_text("utf-8") == content


def test_a_report_is_shown_for_people_and_for_machines(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    show_report(made, json_=False)
    assert capsys.readouterr().out.strip() == "| the | table |"
    show_report(made, json_=True)
    assert json.loads(capsys.readouterr().out) == {"summary": {"found": 1}, "report": [1]}


class Echo(Monitor):
    """Raises an alert on every text."""

    def __init__(self) -> None:
        self.reader = SimpleNamespace(lm=SimpleNamespace(tokenizer=SimpleNamespace()))

    def scan(self, texts):
        return [[Alert(i, text, 1, "", 0, 1, 2.0, 0.5, 1.0)] for i, text in enumerate(texts)]


@pytest.mark.parametrize("batch", [1, 2, 10])
def test_alerts_are_json_lines_and_number_the_texts_over_all_batches(
    batch: int, capsys: pytest.CaptureFixture[str]
) -> None:
    watch(Echo(), io.BytesIO(b'a\n\nb\n{"text": "\xc3\xa9"}'), batch)
    alerts = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(alert["text"], alert["concept"]) for alert in alerts] == [(0, "a"), (1, "b"), (2, "é")]


def test_a_stream_that_is_no_utf8_is_refused_by_line() -> None:
    with pytest.raises(MindAtlasError, match="line 2 is not UTF-8"):
        watch(Echo(), io.BytesIO(b"fine\ncaf\xe9\n"), 1)
