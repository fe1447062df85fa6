"""Several labelers of the same features: one is current, the others stay, and two are compared feature by feature."""

import json
import re
from dataclasses import replace

import pytest

from sae_core.labels import Labels, build_labels
from sae_core.labels.labelers import Earlier, compare, keep_earlier, labeler_name, labelers, open_labels
from sae_core.labels.reader import LabelError, LabelRow, Score
from sae_core.study import LabelSettings


def named_by_model(handler, body) -> None:
    handler.answer(json.dumps({"label": f"by {body['model']}", "description": "", "kind": "input", "confidence": 1}))


@pytest.fixture
def make(endpoint, make_features, tmp_path):
    """Makes labels of the same features by a model, after those of an earlier one."""
    endpoint.behavior = named_by_model
    features = make_features(8)

    def make(name: str, model: str, after: str = "", by: str = ""):
        (tmp_path / name).mkdir()
        settings = LabelSettings(model=model, base_url=endpoint.url, features=4)
        earlier = Earlier(tmp_path / after, by, model) if after else None
        build_labels(settings, features, tmp_path / name, earlier=earlier)
        return tmp_path / name

    return make


def test_what_a_labeler_wrote_stays_beside_what_the_next_one_wrote(make):
    make("one", "a")
    make("two", "b", after="one", by="a")
    folder = make("three", "c", after="two", by="b")
    found = labelers(folder)
    assert [(one.name, one.model, one.written) for one in found] == [("current", "c", 4), ("a", "a", 4), ("b", "b", 4)]
    assert {row.label for row in open_labels(folder, "a").rows()} == {"by a", ""}
    pairs = compare(Labels.open(folder).rows(), open_labels(folder, "b").rows())
    assert [(pair.one, pair.other) for pair in pairs] == [("by c", "by b")] * 4


def test_a_labeler_that_is_current_again_is_no_earlier_one(make):
    make("one", "a")
    make("two", "b", after="one", by="a")
    folder = make("three", "a", after="two", by="b")
    assert [one.name for one in labelers(folder)] == ["current", "b"]
    assert make("four", "a", after="three", by="a")
    assert [one.name for one in labelers(folder)] == ["current", "b"]


def test_labels_that_nobody_wrote_are_not_kept(endpoint, make_features, tmp_path):
    (tmp_path / "one").mkdir()
    build_labels(LabelSettings(model="a", base_url=endpoint.url, features=0), make_features(4), tmp_path / "one")
    keep_earlier(Earlier(tmp_path / "one", "a", "b"), tmp_path)
    assert not (tmp_path / "labelers").exists()


def test_a_labeler_that_is_not_there_is_refused_with_those_that_are(make):
    make("one", "a")
    folder = make("two", "b", after="one", by="a")
    with pytest.raises(LabelError, match="there are current, a"):
        open_labels(folder, "../one/labels")


@pytest.mark.parametrize("model", ["org/model:free", "../../etc/passwd", "модель 7b", "x" * 500])
def test_a_labeler_s_name_is_a_file_s_and_tells_what_it_was_asked_with(model):
    name = labeler_name(model, {"seed": 0}, "1")
    assert re.fullmatch(r"[\w.-]{1,80}", name)
    assert not name.startswith(".")
    others = labeler_name(model, {"seed": 1}, "1"), labeler_name(model, {"seed": 0}, "2")
    assert len({name, *others}) == 3


def test_labels_are_compared_by_the_score_that_goes_the_furthest():
    def scores(**values: float) -> tuple[Score, ...]:
        return tuple(Score(name, value, *[None] * 8, [], 0.0, 4, 4) for name, value in values.items())

    row = LabelRow(0, label="x", status="written")
    one = [replace(row, scores=scores(embedding=0.9, detection=0.6)), LabelRow(1), replace(row, feature=2)]
    other = [replace(row, scores=scores(embedding=0.7)), replace(row, feature=1), replace(row, feature=2)]
    found = compare(one, other)
    assert [(pair.feature, pair.one_score, pair.other_score) for pair in found] == [(0, 0.6, 0.7), (2, None, None)]
