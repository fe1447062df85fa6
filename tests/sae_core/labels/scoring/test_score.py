"""Labels whose truth is known by construction, scored by a judge that answers by rule and by a real model's middle."""

import asyncio
import json
import os
import re
from types import SimpleNamespace
from typing import Any

import duckdb
import numpy as np
import pytest

from sae_core.features import Features
from sae_core.labels import Labels, build_labels
from sae_core.labels.build import Ground
from sae_core.labels.client import EndpointError
from sae_core.labels.endpoint import label_writer
from sae_core.labels.estimate import estimate_labels
from sae_core.labels.reader import LabelRow
from sae_core.labels.scoring.embedding import joined
from sae_core.labels.scoring.nearest import Texts
from sae_core.labels.scoring.score import score_labels
from sae_core.progress import silent
from sae_core.study import LabelSettings, ModelSettings

CACHE = os.environ.get("MIND_ATLAS_CACHE")  # before a fixture sets one that is empty


@pytest.fixture
def by_rule(planted: SimpleNamespace) -> Any:
    """A judge that knows what each true name means, and finds nothing under another; and a writer of true labels."""

    def answer(handler: Any, body: dict[str, Any]) -> None:
        question = body["messages"][-1]["content"]
        if "makes likely" in question:
            marked = "".join(re.findall("<<(.*?)>>", question))
            name = next(name for name, rule in planted.rules.items() if re.search(rule, marked))
            handler.answer(json.dumps({"label": name, "description": "", "kind": "input", "confidence": 1}))
            return
        lines = question.splitlines()
        rule = planted.rules.get(json.loads(lines[-1].removeprefix("name: ")), "(?!)")
        texts = [line.partition(": ")[2] for line in lines[1:-2]]
        if "logprobs" in body:
            digits = [9 if re.search(rule, json.loads(token)) else 0 for token in texts]
            told = [part for i, digit in enumerate(digits, 1) for part in (f"{i}", ":", f" {digit}", "\n")]
            content = [{"token": t, "logprob": 0.0, "top_logprobs": [{"token": t, "logprob": 0.0}]} for t in told]
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "".join(told)}}
            handler.answer("", choices=[choice | {"logprobs": {"content": content}}])
            return
        fits = [all(re.search(rule, part) for part in re.findall("<<(.*?)>>", text) or [text]) for text in texts]
        if "ratings" in body["messages"][0]["content"]:
            handler.answer(json.dumps({"ratings": [3 * fit for fit in fits]}))
        else:
            handler.answer(json.dumps({"texts": [i for i, fit in enumerate(fits, 1) if fit]}))

    return answer


def settings_of(planted: SimpleNamespace, **given: Any) -> LabelSettings:
    """Settings with an embedder that knows nothing, unless another is given."""
    return LabelSettings(**{"embedder": planted.embedder} | given)


@pytest.fixture
def rows(planted: SimpleNamespace) -> list[LabelRow]:
    """The true labels, whose writer saw the first three examples."""
    return [LabelRow(i, f'fires on "top{i}"', "written", n, examples=(0, 1, 2)) for i, n in enumerate(planted.rules)]


@pytest.fixture
def ground(planted: SimpleNamespace, tiny_model) -> Ground:
    return Ground(ModelSettings(source=str(tiny_model)), planted.folder)


def scored(
    settings: LabelSettings, planted: SimpleNamespace, rows: list[LabelRow], notes: Any = None
) -> dict[int, Any]:
    async def work() -> dict[int, Any]:
        with label_writer(settings, "none", lambda *_, **__: None) as client:
            record = (notes if notes is not None else []).append
            features = Features.open(planted.folder)
            return await score_labels(client, rows, [], features, settings, planted.folder, record, 2, silent)

    return asyncio.run(work()).fields


def test_a_judge_that_knows_the_truth_gives_true_labels_all_and_shuffled_ones_chance(endpoint, by_rule, planted, rows):
    endpoint.behavior = by_rule
    found = scored(settings_of(planted, model="m", base_url=endpoint.url), planted, rows)
    assert found.keys() == set(range(5))
    for fields in found.values():
        by = {score.scorer: score for score in fields["scores"]}
        assert by.keys() == {"embedding", "detection", "fuzzing"}
        for scorer in ("detection", "fuzzing"):
            assert by[scorer].score == 1.0
            assert by[scorer].shuffled <= 0.6
            assert by[scorer].lexical == 0.5
            assert by[scorer].margin_low > 0.2
            assert (by[scorer].failed, by[scorer].n_firing, by[scorer].n_silent) == (0, 11, 11)
            assert {by[scorer].random, by[scorer].nearest, by[scorer].neighbor} == {1.0}
        assert fields["beats_control"]


def test_specificity_and_simulation_are_made_when_asked_for_with_controls_and_levels(endpoint, by_rule, planted, rows):
    endpoint.behavior = by_rule
    settings = settings_of(planted, model="m", base_url=endpoint.url, scorers=["specificity", "simulation"])
    notes: list[dict[str, Any]] = []
    found = scored(settings, planted, rows, notes=notes)
    for fields in found.values():
        specificity, simulation = fields["scores"]
        assert (specificity.scorer, specificity.score, specificity.shuffled, specificity.lexical) == (
            "specificity", 3.0, 0.0, 0.0,
        )  # fmt: skip
        assert specificity.levels == [3.0] * 5
        assert (specificity.n_firing, specificity.n_silent, specificity.random) == (11, 0, None)
        assert (simulation.scorer, simulation.n_firing, simulation.n_silent) == ("simulation", 5, 5)
        assert simulation.score == pytest.approx(1.0)  # values are 8 where the rule matches, and 0 elsewhere
        assert simulation.shuffled <= 0.2
        assert (simulation.lexical, simulation.failed) == (0.0, 0.0)
        assert simulation.low == pytest.approx(1.0)
        assert simulation.margin_low > 0
        assert fields["beats_control"] is None  # of detection, fuzzing and embedding
    assert not any("logprobs" in note for note in notes)
    asked = len(endpoint.requests)
    assert scored(settings, planted, rows) == found
    assert len(endpoint.requests) == asked  # log-probabilities are kept with the answer


def test_a_judge_asked_about_one_text_at_a_time_is_read_by_probability(endpoint, planted, rows):
    """It says yes to everything, and a little less surely where the name is wrong: the AUC sees it."""

    def answer(handler: Any, body: dict[str, Any]) -> None:
        name, text = (line.partition(": ")[2] for line in body["messages"][-1]["content"].split("\n"))
        rule = planted.rules.get(json.loads(name), "(?!)")
        fits = all(re.search(rule, part) for part in re.findall("<<(.*?)>>", text) or [text])
        likeliest = [{"token": "yes", "logprob": -0.1}, {"token": "no", "logprob": -4.0 if fits else -3.0}]
        told = {"content": [{"token": "yes", "logprob": -0.1, "top_logprobs": likeliest}]}
        message = {"role": "assistant", "content": "yes"}
        handler.answer("", choices=[{"index": 0, "finish_reason": "stop", "message": message, "logprobs": told}])

    endpoint.behavior = answer
    settings = settings_of(planted, model="m", base_url=endpoint.url, scorers=["detection", "fuzzing"], ask_each=True)
    notes: list[dict[str, Any]] = []
    for fields in scored(settings, planted, rows, notes=notes).values():
        for score in fields["scores"]:
            assert (score.score, score.lexical, score.failed) == (1.0, 0.5, 0.0)
            assert score.shuffled <= 0.6
        assert fields["beats_control"]
    assert len(notes) == 5 * 2 * 3 * 22
    assert len({json.dumps(request["messages"]) for request in endpoint.requests}) == len(endpoint.requests)
    assert {request["max_tokens"] for request in endpoint.requests} == {1}


def test_a_server_without_log_probabilities_is_asked_about_one_text_and_no_more(endpoint, planted, rows):
    endpoint.behavior = lambda h, b: h.answer("yes")
    settings = settings_of(planted, model="m", base_url=endpoint.url, scorers=["fuzzing"], ask_each=True)
    notes: list[dict[str, Any]] = []
    found = scored(settings, planted, rows, notes=notes)
    assert {fields["scores"][0].score for fields in found.values()} == {None}
    assert len(endpoint.requests) <= 2  # two features are judged at once
    assert "set ask_each = false" in notes[0]["error"]


def test_a_local_model_is_asked_about_one_text_at_a_time_unless_told_otherwise():
    assert LabelSettings().asks_each
    assert not LabelSettings(base_url="http://127.0.0.1:9/v1").asks_each
    assert not LabelSettings(ask_each=False).asks_each
    assert LabelSettings(base_url="http://127.0.0.1:9/v1", ask_each=True).asks_each


def test_a_server_without_log_probabilities_is_asked_for_a_simulation_once(endpoint, planted, rows):
    endpoint.behavior = lambda h, b: h.answer("1: 0\n2: 9")
    settings = settings_of(planted, model="m", base_url=endpoint.url, scorers=["simulation"])
    notes: list[dict[str, Any]] = []
    found = scored(settings, planted, rows, notes=notes)
    assert {fields["scores"][0].score for fields in found.values()} == {None}
    assert len(endpoint.requests) <= 2  # two features are judged at once
    assert "log-probabilities" in notes[0]["error"]


def test_a_wrong_label_does_not_beat_its_control(endpoint, by_rule, planted, rows):
    endpoint.behavior = by_rule
    names = list(planted.rules)
    wrong = [LabelRow(i, "x", "written", names[(i + 1) % 5], examples=(0, 1, 2)) for i in range(5)]
    found = scored(settings_of(planted, model="m", base_url=endpoint.url, scorers=["detection"]), planted, wrong)
    assert all(fields["scores"][0].score <= 0.6 for fields in found.values())
    assert not any(fields["beats_control"] for fields in found.values())


def test_texts_are_none_that_the_writer_saw_and_every_question_is_recorded(endpoint, by_rule, planted, rows):
    endpoint.behavior = by_rule
    notes: list[dict[str, Any]] = []
    scored(settings_of(planted, model="m", base_url=endpoint.url, scorers=["fuzzing"]), planted, rows, notes=notes)
    examples = [example for i in range(5) for example in Features.open(planted.folder).examples(i)]
    shown = {"".join(e.tokens) for e in examples if e.document % 100 < 3}
    unseen = {"".join(e.tokens) for e in examples} - shown
    asked = "\n".join(request["messages"][-1]["content"] for request in endpoint.requests)
    plain = re.sub("<<|>>", "", asked)
    assert any(text in plain for text in unseen)
    assert len(notes) == len(endpoint.requests) == 5 * 3
    assert {note["name"] for note in notes if note["scorer"] == "fuzzing"} == {"own", "shuffled", "lexical"}


def test_texts_shown_as_contrast_are_held_against_no_label(endpoint, by_rule, planted, rows, monkeypatch):
    endpoint.behavior = by_rule
    held = lambda self, feature, shown, count: self.features.examples(feature)[3 : 3 + count]  # noqa: E731
    monkeypatch.setattr(Texts, "silent", held)
    settings = settings_of(planted, model="m", base_url=endpoint.url, scorers=["detection"], contrast=5)
    found = scored(settings, planted, rows)
    assert {fields["scores"][0].n_firing for fields in found.values()} == {6}  # 14, less 3 shown and 5 as contrast


def test_contrast_is_what_reads_most_alike_and_holds_no_firing(planted):
    """Against a search by hand: cosine of every window with every example, the best ones first."""
    features = Features.open(planted.folder)
    texts = Texts(planted.embedder, features)
    shown = features.examples(0)[:3]
    found = texts.silent(0, shown, 6)
    fires = features.sample().acts(0)
    windows = texts.embedder.texts([joined(tokens) for tokens in texts.sample.tokens])
    cosine = texts.embedder.texts([joined(e.tokens) for e in shown]) @ windows.T
    order = np.argsort(-cosine, axis=1, kind="stable")[:, :32].T.ravel().tolist()
    expected = [w for w in dict.fromkeys(order) if w not in fires][:6]
    assert [e.document for e in found] == [texts.sample.documents[w] for w in expected]
    assert {(e.kind, e.level, sum(e.acts)) for e in found} == {("silent", 0, 0.0)}
    assert all(0 <= e.peak < len(e.tokens) for e in found)
    assert texts.silent(0, shown, 0) == texts.silent(0, [], 3) == []


def test_a_writer_is_shown_contrast_and_an_estimate_counts_it(endpoint, by_rule, planted, ground, tmp_path):
    endpoint.behavior = by_rule
    settings = settings_of(planted, model="m", base_url=endpoint.url, features=2, examples=3, contrast=4, scorers=[])
    plain = estimate_labels(settings.model_copy(update={"contrast": 0}), planted.folder).prompt_tokens
    assert estimate_labels(settings, planted.folder).prompt_tokens > plain
    build_labels(settings, planted.folder, tmp_path, ground=ground)
    asked = [request["messages"][-1]["content"] for request in endpoint.requests]
    assert [len(q.partition("<silent>\n")[2].partition("\n</silent>")[0].splitlines()) for q in asked] == [4, 4]


def test_answers_that_cannot_be_read_are_counted_and_make_no_score(endpoint, by_rule, planted, rows):
    endpoint.behavior = lambda h, b: h.answer('{"texts": [99]}')
    settings = settings_of(planted, model="m", base_url=endpoint.url, scorers=["detection"], judged=1)
    found = scored(settings, planted, rows)
    (score,) = found[0]["scores"]
    assert (score.score, score.low, score.margin_low, score.failed) == (None, None, None, 1.0)
    assert found[0]["beats_control"] is None
    assert found[1] == {}


def test_a_judge_that_dies_stops_the_run(endpoint, by_rule, planted, rows, monkeypatch):
    monkeypatch.setattr("sae_core.labels.client.RETRIES", 0)
    endpoint.behavior = lambda h, b: h.error(500)
    with pytest.raises(EndpointError, match="5 requests in a row"):
        scored(settings_of(planted, model="m", base_url=endpoint.url, scorers=["detection"]), planted, rows)


def test_few_texts_make_no_score_and_a_single_label_has_no_control(endpoint, by_rule, planted, rows):
    settings = settings_of(planted, scorers=["embedding"])
    seen = [LabelRow(0, "x", "written", "days", examples=tuple(range(11)))]
    assert scored(settings, planted, seen) == {}
    found = scored(settings, planted, rows[:1])
    assert found[0]["scores"][0].shuffled is None
    assert found[0]["beats_control"] is None
    assert scored(settings_of(planted, scorers=[]), planted, rows) == {}


def test_the_table_keeps_the_scores_and_a_second_run_asks_nothing(endpoint, by_rule, planted, ground, rows, tmp_path):
    endpoint.behavior = by_rule
    settings = settings_of(planted, model="m", base_url=endpoint.url, features=5, examples=3)
    summaries = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        summaries.append(build_labels(settings, planted.folder, tmp_path / name, ground=ground))
    assert len(endpoint.requests) == 5 + 5 * 2 * 3
    assert (tmp_path / "a/labels.parquet").read_bytes() == (tmp_path / "b/labels.parquet").read_bytes()
    assert (summaries[0]["scored"], summaries[0]["beats_control"]) == (1.0, 1.0)
    assert summaries[0]["scores"]["detection"]["score"] == [1.0] * 5
    row = Labels.open(tmp_path / "a").label(0)
    assert [score.scorer for score in row.scores] == ["embedding", "detection", "fuzzing"]
    assert row.beats_control
    labels = str(tmp_path / "a/labels.parquet")
    sql = f"SELECT scorer, score FROM (SELECT unnest(scores, max_depth := 2) FROM '{labels}') WHERE scorer = 'fuzzing'"
    assert duckdb.sql(sql).fetchall() == [("fuzzing", 1.0)] * 5


@pytest.fixture
def real_cache(cache, monkeypatch: pytest.MonkeyPatch) -> None:
    if CACHE:
        monkeypatch.setenv("MIND_ATLAS_CACHE", CACHE)
    else:
        monkeypatch.delenv("MIND_ATLAS_CACHE")


def test_a_real_model_s_similarity_tells_true_labels_from_shuffled_ones(planted, rows, real_cache):
    found = scored(LabelSettings(scorers=["embedding"]), planted, rows)
    scores = [fields["scores"][0] for fields in found.values()]
    print(*((s.score, s.low, s.high, s.shuffled, s.lexical, s.margin_low) for s in scores), sep="\n")
    mean = sum(score.score for score in scores) / 5
    assert mean >= 0.7
    assert sum(score.shuffled for score in scores) / 5 <= mean - 0.15
    assert sum(fields["beats_control"] for fields in found.values()) >= 2


def test_an_estimate_foretells_the_judge_s_questions_too(endpoint, by_rule, planted, ground, tmp_path):
    endpoint.behavior = by_rule
    settings = settings_of(planted, model="m", base_url=endpoint.url, features=5, examples=3)
    estimate = estimate_labels(settings, planted.folder)
    assert endpoint.requests == []
    build_labels(settings, planted.folder, tmp_path, ground=ground)
    assert (estimate.features, estimate.requests) == (5, len(endpoint.requests))
    sent = sum(len(m["content"].encode()) for request in endpoint.requests for m in request["messages"])
    assert sent / 4 < estimate.prompt_tokens < sent / 2.8
