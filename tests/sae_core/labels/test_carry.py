"""Labels that kept features of a retrained dictionary take over."""

import hashlib
import json
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sae_core.labels import Labels, build_labels
from sae_core.labels.carry import Previous
from sae_core.labels.reader import SCHEMA
from sae_core.labels.scoring.items import Scored
from sae_core.lineage import LINEAGE, kept_since
from sae_core.lineage import SCHEMA as LINES
from sae_core.study import LabelSettings


def named_by_prompt(handler, body) -> None:
    digest = hashlib.sha256(json.dumps(body["messages"]).encode()).hexdigest()[:6]
    handler.answer(json.dumps({"label": f"thing {digest}", "description": "", "kind": "both", "confidence": 1}))


@pytest.fixture
def settings(endpoint) -> LabelSettings:
    endpoint.behavior = named_by_prompt
    return LabelSettings(model="m", base_url=endpoint.url, features=6, seed=1)


@pytest.fixture
def before(settings, make_features, tmp_path) -> Previous:
    """Six labeled features (1 to 5 are kept, 2 and 3 in exchange), and whatever moved or died is not among them."""
    (tmp_path / "before").mkdir()
    features = make_features(8, dead=())
    build_labels(settings, features, tmp_path / "before")
    return Previous(tmp_path / "before", features, {1: 1, 2: 3, 3: 2, 4: 4, 5: 5})


@pytest.fixture
def now(make_features):
    """Features of the retrained dictionary: one more, of which the fifth never fires."""
    return make_features(9, dead=(5,))


def build(settings, now, folder, **more) -> dict:
    folder.mkdir()
    return build_labels(settings, now, folder, **more)


def mark_as(before: Previous, beats_control: bool | None) -> None:
    rows = [replace(row, beats_control=beats_control) for row in Labels.open(before.labels).rows()]
    table = pa.Table.from_pylist([{name: getattr(row, name) for name in SCHEMA.names} for row in rows], SCHEMA)
    pq.write_table(table, before.labels / "labels.parquet")


def test_no_label_that_still_holds_is_paid_for_again_and_the_others_are_asked_for(
    endpoint, settings, before, now, tmp_path
):
    asked = len(endpoint.requests)
    summary = build(settings.model_copy(update={"seed": 2}), now, tmp_path / "now", previous=before)
    old, new = Labels.open(before.labels).rows(), Labels.open(tmp_path / "now").rows()
    for feature, was in {1: 1, 2: 3, 3: 2, 4: 4}.items():
        assert (new[feature].label, new[feature].made_at) == (old[was].label, old[was].made_at)
    assert [row.feature for row in new if row.seed == 2] == [0, 6]  # of the first six that fire
    assert len(endpoint.requests) - asked == 2
    assert new[5].status == "dead"
    assert (summary["n_carried"], summary["n_labeled"]) == (4, 6)
    noted = [json.loads(line) for line in (tmp_path / "now/attempts.jsonl").read_text().splitlines()]
    assert {note["feature"] for note in noted if "carried" in note} == {1, 2, 3, 4}


def test_what_another_prompt_asked_for_is_not_carried_over(settings, before, now, tmp_path, monkeypatch):
    monkeypatch.setattr("sae_core.labels.prompts.VERSION", "another")
    assert build(settings, now, tmp_path / "now", previous=before)["n_carried"] == 0


@pytest.mark.parametrize(("held", "asked_again"), [(True, True), (None, True), (False, False)])
def test_a_label_that_no_longer_beats_its_control_is_asked_for_anew(
    endpoint, settings, before, now, tmp_path, monkeypatch, held, asked_again
):
    mark_as(before, held)

    async def judged(labeler, rows, *rest) -> Scored:
        return Scored({row.feature: {"beats_control": row.feature != 4} for row in rows}, "")

    monkeypatch.setattr("sae_core.labels.build._score", judged)
    asked = len(endpoint.requests)
    build(settings.model_copy(update={"seed": 2}), now, tmp_path / "now", previous=before)
    rows = Labels.open(tmp_path / "now").rows()
    assert (rows[4].seed == 2) == asked_again
    assert len(endpoint.requests) - asked == 2 + asked_again
    assert rows[1].beats_control


def test_a_carried_label_is_not_given_up_for_a_failure(endpoint, settings, before, now, tmp_path, monkeypatch):
    async def judged(labeler, rows, *rest) -> Scored:
        return Scored({row.feature: {"beats_control": False} for row in rows}, "")

    monkeypatch.setattr("sae_core.labels.build._score", judged)
    endpoint.behavior = lambda h, b: h.answer("prose")
    build(settings.model_copy(update={"seed": 2}), now, tmp_path / "now", previous=before)
    rows = Labels.open(tmp_path / "now").rows()
    assert (rows[4].status, rows[4].seed, rows[0].status) == ("written", 1, "failed")


def test_texts_that_the_writer_saw_are_known_again(settings, before, now, tmp_path):
    build(settings, now, tmp_path / "now", previous=before)
    assert len(Labels.open(tmp_path / "now").label(4).examples) == 11  # all are from one document, which it saw


def lines(folder, *rows: tuple) -> None:
    folder.mkdir(exist_ok=True)
    names = ("generation", "feature", "previous", "fate")
    table = [dict(zip(names, row, strict=True)) | {"cosine": 1.0, "correlation": 1.0} for row in rows]
    pq.write_table(pa.Table.from_pylist(table, LINES), folder / LINEAGE)


def test_only_kept_features_of_the_dictionary_that_came_right_after_count(tmp_path):
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    first.mkdir()
    two = [(2, 0, 0, "kept"), (2, 1, 7, "kept"), (2, 2, 2, "moved"), (2, 3, 1, "split"), (2, None, 5, "died")]
    lines(second, *two)
    lines(third, *two, (3, 0, 1, "kept"))
    assert kept_since(first, second) == {0: 0, 1: 7}
    assert kept_since(second, third) == {0: 1}
    assert kept_since(first, third) == kept_since(second, second) == kept_since(first, first) == {}
