"""Output scores, suggested strengths and the report, on the tiny model, against the whole model run one by one."""

import json
import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pytest_httpserver import HTTPServer
from safetensors.numpy import save_file
from transformers import BloomConfig, BloomForCausalLM
from werkzeug import Request, Response

from sae_core.corpus import Corpus
from sae_core.dictionary import Dictionary
from sae_core.labels.reader import SCHEMA as LABELS_SCHEMA
from sae_core.labels.reader import LabelRow
from sae_core.language_model import LanguageModel
from sae_core.names import Site
from sae_core.steering import Steer, Steering
from sae_core.steering_levers import Lever, levers
from sae_core.steering_report import Made, Row, build_steering_report, read_report
from sae_core.steering_report.choosing import CHOOSING, Forecast, candidates
from sae_core.steering_report.measuring import REPORTING, first_token_kl
from sae_core.steering_report.rows import expected_to_rise, raised
from sae_core.steering_report.writing import markdown
from sae_core.steering_scores import (
    NEUTRAL,
    build_steering,
    live_features,
    output_effects,
    search_strength,
    suggest_strengths,
)
from sae_core.steering_texts import (
    Condition,
    Subject,
    bootstrap,
    concept_rate,
    measure_texts,
    repetition,
    with_controls,
    word_ids,
    write_texts,
)
from sae_core.steers import SteeringError
from sae_core.study import LabelSettings, SteeringReportSettings, SteeringSettings

D_SAE, DEAD, PLANTED = 12, 4, 7
SITE = Site("tiny-llama", "resid_post", 3, "mini")
SETTINGS = SteeringSettings(promoted_tokens=5, suggested=2, strengths=(0.5, 50.0), max_tokens=6)


@pytest.fixture(scope="module")
def folders(lm: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A dictionary at the last layer, one of whose rows points at a token, and what its features promote."""
    root = tmp_path_factory.mktemp("steering")
    made = {name: root / name for name in ("dictionary", "features", "labels", "steering", "report")}
    for folder in made.values():
        folder.mkdir()
    unembedding = lm.unembedding()
    W_dec = torch.randn(D_SAE, 32, generator=torch.Generator().manual_seed(0))
    W_dec[PLANTED] = unembedding[:, lm.tokenizer("bridge")["input_ids"][0]]
    W_dec = torch.nn.functional.normalize(W_dec, dim=1)
    zeros = torch.zeros(D_SAE)
    config = {"architecture": "batch_top_k"}
    Dictionary(W_dec.T.clone(), zeros, W_dec, torch.zeros(32), zeros.clone(), config).save(made["dictionary"])
    promoted = (W_dec @ unembedding)[:, 3:].topk(4).indices + 3
    rows = []
    for i in range(D_SAE):
        alive = i != DEAD
        tokens = lm.token_strings(promoted[i])
        rows.append({
            "feature": i, "n_fired": 5 * alive, "density": 0.1 * alive, "max_act": (4.0 + i / 10) * alive,
            "mean_act": 1.0 * alive, "is_dead": not alive, "promoted": tokens, "promoted_logits": [1.0] * 4,
            "suppressed": [], "suppressed_logits": [], "histogram": [5],
            "top_tokens": [" the", " river", "??", " bridge"], "top_token_shares": [0.01, 0.5, 0.4, 0.3],
        })  # fmt: skip
    pq.write_table(pa.Table.from_pylist(rows), made["features"] / "features.parquet")
    pq.write_table(pa.table({"feature": [0]}), made["features"] / "examples.parquet")
    labels = [asdict(LabelRow(i, "bridge, river", label="bridges" if i == PLANTED else "")) for i in range(D_SAE)]
    pq.write_table(pa.Table.from_pylist(labels, LABELS_SCHEMA), made["labels"] / "labels.parquet")
    return made


@pytest.fixture(scope="module")
def subject(lm: LanguageModel, folders: dict[str, Path]) -> Subject:
    return Subject.open(lm, SITE, folders["dictionary"], folders["features"], math.inf)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Blocks of random tokens, two documents a block, for both splits."""
    folder, rng = tmp_path_factory.mktemp("corpus"), np.random.default_rng(0)
    for split in ("train", "held_out"):
        ids = rng.integers(3, 512, (12, 32), dtype=np.int32)
        documents = np.repeat(np.arange(24, dtype=np.int32).reshape(12, 2), 16, axis=1)
        columns = {"token_ids": ids, "documents": documents, "positions": documents % 1}
        save_file(columns, folder / f"{split}.safetensors")
    return folder


@pytest.fixture(scope="module")
def scores(folders: dict[str, Path], subject: Subject) -> dict[str, Any]:
    """The summary of the stage, which has been made."""
    return build_steering(SETTINGS, subject, folders["steering"])


def bloom() -> LanguageModel:
    torch.manual_seed(1)
    return LanguageModel(BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=3, n_head=4)), None)


@pytest.mark.parametrize("family", ["llama", "bloom"])
def test_a_pass_resumed_at_a_layer_gives_the_logits_of_the_whole(lm: LanguageModel, family: str) -> None:
    tested = lm if family == "llama" else bloom()  # whose layers return tuples
    ids = torch.tensor([[5, 6, 7, 8], [9, 10, 11, 12]])
    whole = tested.logits(ids)
    for layer in range(tested.n_layers):
        acts = tested.capture("resid_pre", layer, ids)
        with tested.resumed(layer, acts):
            torch.testing.assert_close(tested.logits(torch.zeros_like(ids)), whole)
    assert torch.equal(tested.logits(ids), whole)


def test_an_output_score_is_the_mean_climb_in_rank_of_the_features_own_tokens(subject: Subject) -> None:
    effects = output_effects(subject, np.array([2, PLANTED]), SETTINGS)
    lm, W_dec = subject.lm, subject.dictionary.W_dec
    for place, feature in enumerate((2, PLANTED)):
        lens = W_dec[feature] @ subject.unembedding
        lens[~subject.shown] = -math.inf
        climbs, gains = [], []
        steering = Steering(SITE, subject.dictionary, [Steer(feature, SETTINGS.probe_strength)], subject.max_acts)
        for text in NEUTRAL:
            ids = torch.tensor([lm.prompt_ids(text)])
            with steering.applied(lm):
                after = lm.logits(ids)[0, -1]
            before = lm.logits(ids)[0, -1]
            for token in lens.topk(5).indices.tolist():
                ranks = [int((logits.argsort(descending=True) == token).nonzero()) + 1 for logits in (before, after)]
                climbs.append(math.log(ranks[0] / ranks[1]) / math.log(512))
                gains.append(float(after.softmax(0)[token] - before.softmax(0)[token]))
        assert float(effects.score[place]) == pytest.approx(np.mean(climbs), abs=1e-4)
        assert float(effects.gain[place]) == pytest.approx(np.sum(gains) / len(NEUTRAL), abs=1e-4)


def test_every_live_feature_is_scored_and_dead_ones_are_left_empty(
    scores: dict[str, Any], folders: dict[str, Path]
) -> None:
    table = pq.read_table(folders["steering"] / "scores.parquet").to_pylist()
    assert [row["feature"] for row in table] == list(range(D_SAE))
    assert [i for i, row in enumerate(table) if row["output_score"] is None] == [DEAD]
    assert scores["n_scored"] == D_SAE - 1
    assert sum(row["suggested_strength"] is not None for row in table) == 2
    bound = scores["random_direction_score_p95"]
    assert all((row["role"] == "output") == (row["output_score"] > bound) for row in table if row["role"])


def test_the_features_of_the_largest_maxima_are_scored_when_not_all_are(subject: Subject) -> None:
    assert live_features(subject, 3).tolist() == [9, 10, 11]
    assert DEAD not in live_features(subject)


@pytest.mark.parametrize(("bound", "expected"), [(1e9, 50.0), (1.0, 0.0)])
def test_a_suggested_strength_is_the_largest_that_is_fluent(subject: Subject, bound: float, expected: float) -> None:
    settings = SETTINGS.model_copy(
        update={"perplexity_ratio_max": bound, "repetition_max": 1.0, "strengths": (5.0, 50.0)}
    )
    assert suggest_strengths(subject, [PLANTED], settings) == {PLANTED: expected}


def test_asked_about_one_feature_it_is_the_same_rule_prompt_by_prompt(subject: Subject) -> None:
    settings = SETTINGS.model_copy(
        update={"perplexity_ratio_max": 1e9, "repetition_max": 1.0, "strengths": (50.0, 5.0)}
    )
    assert list(search_strength(subject, PLANTED, settings)) == [50.0] * 3
    none = settings.model_copy(update={"perplexity_ratio_max": 1.0})
    assert list(search_strength(subject, PLANTED, none)) == [0.0] * 3
    for feature, why in ((DEAD, "dead"), (-1, "does not exist")):
        with pytest.raises(SteeringError, match=why):
            next(search_strength(subject, feature, settings))


def test_texts_are_steered_as_their_condition_says_and_draw_with_the_same_seeds(subject: Subject) -> None:
    conditions = [Condition(), Condition(Steer(PLANTED, 50.0)), Condition(Steer(PLANTED, 0.0, "add")), Condition()]
    texts = write_texts(subject, ["Rain", "The river"], conditions, 2, 8, 1.0, seed=3)
    by = {(text.condition, text.prompt, text.seed): text.ids for text in texts}
    assert len(by) == 16
    for prompt in (0, 1):
        for seed in (0, 1):
            assert by[0, prompt, seed] == by[2, prompt, seed] == by[3, prompt, seed]
    assert all(by[0, p, 0] != by[1, p, 0] for p in (0, 1))
    assert by[0, 0, 0] != by[0, 0, 1]


def test_perplexity_is_that_of_the_answer_under_the_model_as_it_is(subject: Subject) -> None:
    texts = write_texts(subject, ["Rain", "The old bridge"], [Condition(Steer(PLANTED, 5.0))], 1, 7, 1.0)
    for text, measured in zip(texts, measure_texts(subject, texts), strict=True):
        whole = torch.tensor([text.prompt_ids + text.ids])
        logprobs = subject.lm.logits(whole)[0].log_softmax(-1)
        own = [float(logprobs[len(text.prompt_ids) + i - 1, token]) for i, token in enumerate(text.ids)]
        assert measured.nll == pytest.approx(-np.mean(own), abs=1e-4)


@pytest.mark.parametrize(
    ("ids", "expected"), [([], 0), ([1, 1], 0), ([1, 2, 3, 4], 0), ([1] * 6, 3 / 4), ([1, 2, 3, 1, 2, 3], 1 / 4)]
)
def test_repetition_is_the_share_of_token_triples_seen_before(ids: list[int], expected: float) -> None:
    assert repetition(ids) == expected


def test_a_concept_is_whole_rare_words_and_its_rate_counts_them_in_any_case_and_spacing(subject: Subject) -> None:
    row = subject.features.feature(PLANTED)
    rates = {"river": 1e-4, "bridge": 0.2, "the": 1e-4}
    assert subject.concept(row, rates, 1e-3) == ["river"]  # " the" too seldom fired on, "??" no word, "bridge" not rare
    assert subject.concept(row, rates, 1.0) == ["river", "bridge"]
    assert subject.concept(row, {"bridge": 0.2}, 1.0) == ["bridge"]  # what the corpus does not know is no word
    ids = [i for word in (" river", " the", "river") for i in subject.lm.tokenizer(word)["input_ids"]]
    (text,) = write_texts(subject, ["Rain"], [Condition()], 1, 4, 0.0)
    words = [subject.words[i] for i in ids]
    assert concept_rate(subject, text._replace(ids=ids), {"river"}) == words.count("river") / len(ids)
    assert concept_rate(subject, text._replace(ids=[]), {"river"}) == 0
    rates = subject.word_rates(np.array([ids, ids]))
    assert rates["river"] == pytest.approx(words.count("river") / len(ids))


def test_an_interval_holds_the_mean_and_shrinks_with_more_texts() -> None:
    values = np.array([0.0, 0.1, 0.3, 0.2])
    low, high = bootstrap(values)
    assert low < values.mean() < high
    narrow = bootstrap(np.tile(values, 25))
    assert narrow[1] - narrow[0] < (high - low) / 3
    assert bootstrap(np.full(5, 0.25)) == (0.25, 0.25)


def test_the_first_tokens_divergence_is_nothing_without_steering(subject: Subject) -> None:
    kl = first_token_kl(
        subject, ["Rain"], [Condition(), Condition(Steer(PLANTED, 20.0)), Condition(Steer(1, 0, "add"))]
    )
    assert kl[0] == pytest.approx(0, abs=1e-6)
    assert kl[2] == pytest.approx(0, abs=1e-6)
    assert kl[1] > 0.1


REPORTED = SteeringReportSettings(
    candidates=3, features=2, words_min=1, word_rate_max=1, base_rate_max=1, seeds=1, base_seeds=2, max_tokens=6,
    strengths=(1.0, 4.0), forecast_ratio_max=1e9,
)  # fmt: skip


def test_what_is_expected_of_a_strength_is_that_of_the_model_run_with_it(
    scores: dict[str, Any], subject: Subject, folders: dict[str, Path]
) -> None:
    forecast = Forecast(subject, REPORTED)
    made = (folders["steering"], folders["labels"], {"river": 1e-4, "bridge": 1e-4})
    (found,) = (c for c in candidates(subject, *made, REPORTED, forecast) if c.feature == PLANTED)
    assert (found.label, found.words) == ("bridges", ["river", "bridge"])
    words = word_ids(subject, found.words)
    texts = write_texts(subject, CHOOSING, [Condition()], 1, 6, 0.7)
    said: dict[float, list[float]] = {}
    nll: dict[float, list[float]] = {}
    for strength in (0.0, 1.0, 4.0):
        steering = subject.steering([Steer(PLANTED, strength)] if strength else [])
        for text in texts:
            ids, first = torch.tensor([text.prompt_ids + text.ids]), len(text.prompt_ids) - 1
            plain = subject.lm.logits(ids)[0, first:-1].log_softmax(-1)
            with steering.applied(subject.lm):
                drawn = (subject.lm.logits(ids)[0, first:-1] / 0.7).softmax(-1)
            said.setdefault(strength, []).extend(drawn[:, words].sum(1).tolist())
            nll.setdefault(strength, []).extend((-(drawn * plain).sum(1)).tolist())
    assert found.base_rate == pytest.approx(np.mean(said[0.0]), rel=1e-3)
    for choice in forecast.of(found):
        assert choice.rate == pytest.approx(np.mean(said[choice.strength]), rel=1e-3)
        ratio = math.exp(np.mean(nll[choice.strength]) - np.mean(nll[0.0]))
        assert choice.perplexity_ratio == pytest.approx(ratio, rel=1e-3)


def test_what_is_watched_is_the_probability_that_the_token_would_be_of_the_set(subject: Subject) -> None:
    steer, sets = Steer(PLANTED, 5.0), ((5, 9, 30), (7,))
    (text,) = write_texts(subject, ["Rain"], [Condition(steer, watched=sets)], 1, 5, 0.7)
    with subject.steering([steer]).applied(subject.lm):
        logits = subject.lm.logits(torch.tensor([text.prompt_ids + text.ids]))[0, len(text.prompt_ids) - 1 : -1]
    drawn = (logits / 0.7).softmax(-1)
    wanted = np.stack([drawn[:, list(some)].sum(1) for some in sets], 1)
    np.testing.assert_allclose(text.watched, wanted, rtol=1e-3)
    (plain,) = write_texts(subject, ["Rain"], [Condition(steer)], 1, 5, 0.7)
    assert plain.ids == text.ids
    assert plain.watched.shape == (5, 0)


def test_controls_are_as_many_other_live_features_and_directions_as_are_asked_for(subject: Subject) -> None:
    steer = Steer(PLANTED, 2.0)
    found = with_controls(subject, steer, 3, seed=1)
    assert found["feature"] == [Condition(steer)]
    others = {condition.steer.feature for condition in found["random_feature"] if condition.steer}
    assert len(others) == 3
    assert not others & {PLANTED, DEAD}
    assert {c.steer for c in found["random_direction"]} == {steer}
    assert len(with_controls(subject, steer, 100, seed=1)["random_feature"]) == D_SAE - 2


def test_the_report_holds_every_feature_with_every_control(
    scores: dict[str, Any], subject: Subject, folders: dict[str, Path], corpus: Path, tiny_embedder: Path
) -> None:
    made = Made(folders["steering"], folders["labels"], corpus)
    judge = LabelSettings(features=0, embedder=str(tiny_embedder))
    summary = build_steering_report(REPORTED, subject, made, "documents", judge, None, folders["report"])
    rows = read_report(folders["report"])
    choices = pq.read_table(folders["report"] / "choices.parquet").to_pylist()
    table = pq.read_table(folders["steering"] / "scores.parquet").to_pylist()
    best = sorted((row for row in table if row["output_score"] is not None), key=lambda row: -row["output_score"])
    rates = subject.word_rates(Corpus.open(corpus).train.token_ids)
    with_words = [
        row["feature"] for row in best if subject.concept(subject.features.feature(row["feature"]), rates, 1.0)
    ]
    assert list(dict.fromkeys(choice["feature"] for choice in choices)) == with_words[:3]
    strongest = {
        feature: max((c for c in choices if c["feature"] == feature), key=lambda c: (c["rate"], c["strength"]))
        for feature in with_words[:3]
    }
    promising = sorted(strongest, key=lambda i: -strongest[i]["rate"] / max(strongest[i]["base_rate"], 5e-4))
    chosen = {choice["feature"]: choice["strength"] for choice in choices if choice["chosen"]}
    assert chosen == {feature: strongest[feature]["strength"] for feature in promising[:2]}
    assert {row.feature for row in rows} == set(chosen)
    for feature, strength in chosen.items():
        reported = {row.condition: row for row in rows if row.feature == feature}
        assert list(reported) == ["base", "steered", "random_direction", "random_feature", "prompt_only"]
        assert {row.strength for kind, row in reported.items() if kind not in ("base", "prompt_only")} == {strength}
        assert reported["base"].perplexity_ratio == pytest.approx(1)
        assert 0 < reported["base"].expected_ratio <= 1 + 1e-6  # less where it is seldom than half a token of the texts
        assert reported["base"].kl_first == pytest.approx(0, abs=1e-6)
        assert {row.label for row in reported.values()} == {"bridges" if feature == PLANTED else "bridge, river"}
        for row in reported.values():
            assert row.low <= row.concept_rate <= row.high
            assert row.expected_low <= row.expected_rate <= row.expected_high
            assert -1 <= row.similarity_low <= row.similarity <= row.similarity_high <= 1
            assert (row.n_graded, row.overall) == (0, None)
            assert row.n_texts == (3 if row.condition == "base" else 1) * len(REPORTING)
    assert (summary["n_candidates"], summary["n_features"]) == (3, 2)
    assert summary["n_raised"] == len(raised(rows, 2.0))
    assert (summary["judged"], summary["failed"], summary["stopped"]) == (0, 0, "")
    shown = (folders["report"] / "report.md").read_text("utf-8")
    assert shown.count("| steered") == 2 + 2 + 1  # each feature's words and label, and the means
    assert json.dumps(REPORTING[0]) in shown
    assert "concept | instruction" not in shown


def test_features_whose_words_are_said_anyway_are_not_measured(
    scores: dict[str, Any], subject: Subject, folders: dict[str, Path], corpus: Path, tmp_path: Path
) -> None:
    settings = REPORTED.model_copy(update={"word_rate_max": 0.0})
    made = Made(folders["steering"], folders["labels"], corpus)
    judge = LabelSettings(base_url="http://127.0.0.1:9/v1")  # nobody is asked about nothing
    summary = build_steering_report(settings, subject, made, "documents", judge, None, tmp_path)
    assert summary["n_features"] == summary["n_candidates"] == 0
    assert "No feature was measured" in (tmp_path / "report.md").read_text("utf-8")


def test_a_judge_of_labels_grades_the_texts_too_and_what_it_cannot_say_is_counted(
    scores: dict[str, Any], subject: Subject, folders: dict[str, Path], corpus: Path, tmp_path: Path,
    tiny_embedder: Path, httpserver: HTTPServer, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("MIND_ATLAS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    asked: list[str] = []

    def answer(request: Request) -> Response:
        question = request.get_json()["messages"][-1]["content"]
        asked.append(question)
        concept = 2 if "Who are you?" in question else 0
        told = "I will not." if "Write a letter." in question else json.dumps(
            {"concept": concept, "instruction": 1, "fluency": 2}
        )  # fmt: skip
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": told}}
        body = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
        return Response(json.dumps(body), content_type="application/json")

    httpserver.expect_request("/v1/chat/completions").respond_with_handler(answer)
    judge = LabelSettings(base_url=httpserver.url_for("/v1"), model="m", judged=1, embedder=str(tiny_embedder))
    made = Made(folders["steering"], folders["labels"], corpus)
    summary = build_steering_report(REPORTED, subject, made, "documents", judge, "key", tmp_path)
    rows = read_report(tmp_path)
    n_texts = sum(row.n_texts for row in rows if row.feature == rows[0].feature)
    assert summary["judged"] == n_texts
    assert summary["failed"] == n_texts // len(REPORTING)
    assert len(asked) == len(set(asked))  # a text that came twice is asked about once
    for row in rows:
        if row.feature != rows[0].feature:
            assert (row.n_graded, row.overall) == (0, None)
            continue
        assert row.n_graded == row.n_texts - row.n_texts // len(REPORTING)
        assert (row.instruction, row.fluency) == (1, 2)
        assert row.concept == pytest.approx(2 / 7)  # of eight prompts, one shows it and one has no answer
        assert row.overall == pytest.approx(1.5 / 7)  # 3 / (1/2 + 1 + 1/2) for that one, 0 for those without it
        assert row.overall_low is not None
        assert row.overall_high is not None
        assert row.overall_low <= row.overall <= row.overall_high
    lines = [json.loads(line) for line in (tmp_path / "grades.jsonl").read_text("utf-8").splitlines()]
    assert len(lines) == n_texts
    assert sum(line["error"] != "" for line in lines) == summary["failed"]
    shown = (tmp_path / "report.md").read_text("utf-8")
    assert f"Of {n_texts} texts, {summary['failed']} have none" in shown


def test_a_levers_rise_is_the_loss_of_the_edited_model_less_that_of_the_model_as_it_is(
    subject: Subject, corpus: Path
) -> None:
    found = levers(subject, [PLANTED], corpus, "documents", 10**6)
    assert [lever.change for lever in found] == ["ablated", "doubled", "random"]
    lm, blocks = subject.lm, Corpus.open(corpus).held_out
    rises = []
    for row in range(len(blocks.token_ids)):
        ids = torch.from_numpy(blocks.token_ids[row : row + 1]).long()
        documents = torch.from_numpy(blocks.documents[row : row + 1])
        acts = subject.dictionary.encode(lm.capture("resid_post", 3, ids, documents)[0])[:, PLANTED]
        if not float(acts.sum()):
            continue
        losses = []
        for strength in (0.0, 1.0):
            with Steering(SITE, subject.dictionary, [Steer(PLANTED, strength, "scale")], subject.max_acts).applied(lm):
                logprobs = lm.logits(ids, documents)[0].log_softmax(-1)
            counted = [
                -float(logprobs[i, ids[0, i + 1]])
                for i in range(int((acts > 0).nonzero()[0]), ids.shape[1] - 1)
                if documents[0, i] == documents[0, i + 1] >= 0
            ]
            losses.append(np.mean(counted) if counted else math.nan)
        rises.append((float(acts.sum()), losses[0] - losses[1]))
    best = [rise for _, rise in sorted(rises, reverse=True)[:8] if math.isfinite(rise)]
    assert found[0].rise == pytest.approx(np.mean(best), abs=1e-4)
    assert found[0].low <= found[0].rise <= found[0].high
    assert found[0].n_windows == len(best)


def told(feature: int, condition: str, rate: float, ratio: float, low: float = 0.05, perplexity: float = 1.5) -> Row:
    return Row(
        feature=feature, label="x", words="a|b <c>", output_score=0.5, condition=condition, strength=2.0,
        concept_rate=rate, low=low, high=0.2, ratio=ratio, texts_with_concept=0.5, expected_rate=rate / 2,
        expected_low=low / 2, expected_high=0.1, expected_ratio=ratio / 2, similarity=0.1, similarity_low=0.0,
        similarity_high=0.2, perplexity_ratio=perplexity, repetition=0.0, kl_first=1.0, n_texts=4,
        sample="one\ntwo | three",
    )  # fmt: skip


ROWS = [
    row
    for feature, steered in enumerate(
        [
            told(0, "steered", 0.2, 20.0), told(1, "steered", 0.12, 12.0),
            told(2, "steered", 0.12, 12.0, perplexity=2.5),
            told(3, "steered", 0.09, 9.0), told(4, "steered", 0.12, 12.0, low=0.01),
        ]
    )
    for row in (told(feature, "base", 0.01, 1.0), steered)
]  # fmt: skip


def test_only_what_is_raised_tenfold_above_chance_and_within_the_bound_counts() -> None:
    assert raised(ROWS, 2.0) == [0, 1]
    assert raised(ROWS, 3.0) == [0, 1, 2]
    assert expected_to_rise(ROWS, 2.0) == [0]


def test_failures_are_shown_and_no_text_breaks_a_table() -> None:
    pulled = [Lever(1, change, 0.25, 0.125, 0.5, 8) for change in ("ablated", "doubled", "random")]
    summary = {"n_features": 5, "n_raised": 2, "n_expected": 1, "judged": 0, "failed": 0, "stopped": ""}
    shown = markdown([], ROWS, pulled, SteeringReportSettings(), summary)
    assert "| 1 | 8 | 0.2500 [0.1250, 0.5000] |" in shown
    assert "Of these features, 2 say their words" in shown
    assert all(f"| {feature} | a\\|b &lt;c> | steered" in shown for feature in range(5))
    assert "one two \\| three" in shown
    assert "No feature was measured" in markdown([], [], [], SteeringReportSettings(), summary)
