"""Behaviors on the tiny model: log-odds against the whole model run one by one, and a planted feature of a pronoun."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from sae_core.dictionary import Dictionary
from sae_core.features import Features
from sae_core.language_model import LanguageModel
from sae_core.names import Site
from sae_core.safety.behaviors import (
    Behavior,
    BehaviorError,
    Choice,
    Choices,
    build_behaviors,
    known,
    load_behaviors,
    measure,
)
from sae_core.safety.concepts import load_concepts
from sae_core.steering import Steer
from sae_core.steering_texts import Condition, Subject
from sae_core.study import BehaviorSettings, ModelSettings

D_SAE, PLANTED = 12, 7
SITE = Site("tiny-llama", "resid_post", 3, "mini")
PRONOUNS = Behavior(
    name="pronouns", description="Goes on with one.", concept="gender_bias", instruction="Rather the other.",
    text="The {job} said", one=[" bridge"], one_means="bridge", other=[" river"], other_means="river",
    items=[{"job": job} for job in ("dog", "fox", "cat", "river", "planet")],
)  # fmt: skip


@pytest.fixture(scope="module")
def lm(tiny_model: Path) -> LanguageModel:
    return LanguageModel.load(ModelSettings(source=str(tiny_model)), precision="float32")


@pytest.fixture(scope="module")
def folders(lm: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A dictionary at the last layer, a row of which points from ` river` to ` bridge`; and an audit that chose it."""
    made = {name: tmp_path_factory.mktemp(name) for name in ("dictionary", "features", "audit")}
    W_dec = torch.randn(D_SAE, 32, generator=torch.Generator().manual_seed(0))
    one, other = (lm.tokenizer(word)["input_ids"][0] for word in (" bridge", " river"))
    W_dec[PLANTED] = lm.unembedding()[:, one] - lm.unembedding()[:, other]
    W_dec, zeros = torch.nn.functional.normalize(W_dec, dim=1), torch.zeros(D_SAE)
    config = {"architecture": "batch_top_k"}
    Dictionary(W_dec.T.clone(), zeros, W_dec, torch.zeros(32), zeros.clone(), config).save(made["dictionary"])
    table = pa.table({"feature": range(D_SAE), "max_act": [4.0] * D_SAE})
    pq.write_table(table, made["features"] / "features.parquet")
    pq.write_table(pa.table({"feature": [0]}), made["features"] / "examples.parquet")
    found = [{"concept": b.concept, "candidates": [{"feature": PLANTED}]} for b in load_behaviors()]
    (made["audit"] / "audit.json").write_text(json.dumps(found), "utf-8")
    return made


@pytest.fixture(scope="module")
def subject(lm: LanguageModel, folders: dict[str, Path]) -> Subject:
    dictionary = Dictionary.load(folders["dictionary"])
    return Subject(lm, SITE, dictionary, Features.open(folders["features"]), 1e9)


def logprob(subject: Subject, ids: list[int], way: list[int]) -> float:
    logprobs = subject.lm.logits(torch.tensor([ids + way])).float().log_softmax(-1)[0]
    return sum(float(logprobs[len(ids) - 1 + i, token]) for i, token in enumerate(way))


def test_log_odds_are_those_of_each_way_read_by_itself(subject: Subject) -> None:
    choice = Choice([5, 9, 30], [[40], [41, 60, 61], [41, 60, 62]], [[50], [41, 70]])
    steer = Steer(PLANTED, 2.0)
    direction = subject.random_directions(1, 0)[0]
    conditions = [Condition(), Condition(steer), Condition(steer, direction)]
    found = Choices(subject, [choice]).under(conditions)
    for row, condition in enumerate(conditions):
        directions = None if condition.direction is None else condition.direction[None]
        steering = subject.steering([steer] if condition.steer else [], directions=directions)
        with steering.applied(subject.lm):
            said = [[logprob(subject, choice.prompt, way) for way in side] for side in choice[1:]]
        one, other = map(np.logaddexp.reduce, said)
        assert found.odds[row, 0] == pytest.approx(one - other, abs=1e-4)
        assert found.said[row, 0] == pytest.approx(np.logaddexp(one, other), abs=1e-4)


def test_a_planted_feature_goes_up_and_down_and_beyond_its_controls(subject: Subject) -> None:
    settings = BehaviorSettings(controls=4)
    found = {(e.change, e.by): e for e in measure(subject, PRONOUNS, PRONOUNS.items, [PLANTED], settings)}
    up, down = found["up", "feature"], found["down", "feature"]
    assert up.low > 0 > down.high
    assert up.as_large == 0
    assert abs(found["up", "random_direction"].shift) < up.shift
    assert found["up", "random_direction"].draws == found["up", "random_feature"].draws == 4
    assert up.rate >= found["none", "nothing"].rate >= down.rate
    assert found["none", "nothing"].shift == 0
    assert found["asked", "words"].as_large is None


def test_every_choice_under_every_change_is_told(subject: Subject) -> None:
    told: list[tuple[int, int, str]] = []

    def report(done: int, total: int, unit: str, **values: float) -> None:
        told.append((done, total, unit))

    measure(subject, PRONOUNS, PRONOUNS.items, [PLANTED, 0], BehaviorSettings(controls=1), report)
    total = 5 * (2 + 2 * 3)  # as it is, asked in words, and two features down, ablated and up
    assert told == [(done, total, "choices") for done in range(11, total + 1)]


def test_an_item_that_the_model_does_not_know_does_not_count(subject: Subject) -> None:
    turns = [{"role": "user", "content": "The {job}?"}]
    asked = PRONOUNS.model_copy(update={"turns": turns, "before": turns, "text": ""})
    choices = [
        Choice(subject.lm.prompt_ids([{"role": "user", "content": f"The {item['job']}?"}]),
               *([subject.lm.tokenizer(w)["input_ids"]] for w in (" bridge", " river"))) for item in PRONOUNS.items
    ]  # fmt: skip
    odds = Choices(subject, choices).under([Condition()]).odds[0]
    assert known(subject, asked) == [item for item, one in zip(PRONOUNS.items, odds, strict=True) if one < 0]
    assert known(subject, PRONOUNS) == PRONOUNS.items


def test_the_stage_writes_every_change_of_every_behavior_beside_its_controls(
    folders: dict[str, Path], subject: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    short = [b.model_copy(update={"items": b.items[:4]}) for b in load_behaviors()]
    monkeypatch.setattr("sae_core.safety.behaviors.load_behaviors", lambda: short)
    settings = BehaviorSettings(features=1, controls=2)
    summary = build_behaviors(settings, subject, folders["audit"], tmp_path)
    assert summary["items_bad_poem"] == summary["items_profession_pronoun"] == 4
    assert summary["n_not_finite"] == 0
    rows = pq.read_table(tmp_path / "behaviors.parquet").to_pylist()
    of = {(row["change"], row["by"]) for row in rows if row["behavior"] == "profession_pronoun"}
    by = ("feature", "random_direction", "random_feature")
    changed = {(change, kind) for change in ("down", "ablated", "up") for kind in by}
    assert of == changed | {("none", "nothing"), ("asked", "words")}
    text = (tmp_path / "behaviors.md").read_text("utf-8")
    assert f"Of {summary['n_changes']} changes by features" in text
    assert "of 4 |" in text
    assert json.loads((tmp_path / "behaviors.json").read_text("utf-8"))["effects"] == rows


def test_an_audit_without_the_concept_is_refused(subject: Subject, tmp_path: Path) -> None:
    (tmp_path / "audit.json").write_text("[]", "utf-8")
    with pytest.raises(BehaviorError, match="the audit has no concept 'sycophantic_praise'"):
        build_behaviors(BehaviorSettings(), subject, tmp_path, tmp_path)


def test_every_shipped_behavior_is_filled_by_each_of_its_items_and_of_a_concept_of_the_catalog() -> None:
    names = {concept.name for concept in load_concepts()}
    for behavior in load_behaviors():
        assert behavior.concept in names
        assert bool(behavior.text) != bool(behavior.turns)
        for item in behavior.items:
            texts = [behavior.text, *(t["content"] for t in (*behavior.turns, *behavior.before))]
            filled = [text.format(**item) for text in (*texts, *behavior.one, *behavior.other)]
            assert len({*behavior.one, *behavior.other}) == len(behavior.one) + len(behavior.other)
            assert all("{" not in text for text in filled)
        assert len({json.dumps(item) for item in behavior.items}) == len(behavior.items) >= 20
