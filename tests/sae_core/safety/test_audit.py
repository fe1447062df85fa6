import json
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy import sparse

from sae_core.atlas import Atlas
from sae_core.features import Example, Features, Sample
from sae_core.language_model import LanguageModel
from sae_core.prompt_reader import Pooled, PromptReader
from sae_core.safety.audit import ConceptAudit, audit, build_audit, is_rated, lost_concepts
from sae_core.safety.baselines import fit_probe, fit_words, random_features
from sae_core.safety.concepts import Concept, load_concepts
from sae_core.safety.monitor import load_detectors
from sae_core.safety.report import markdown, verdict
from sae_core.safety.shapes import Measured, Random, Steers
from sae_core.safety.specificity import Judge, is_about, specificity
from sae_core.study import SafetySettings

D_SAE, OWN = 30, 4
"""Feature 4 fires on what holds `owl`."""


def concept(name: str = "owls", n: int = 60, **more: Any) -> Concept:
    def rule(word: str) -> dict[str, Any]:
        prompts = {"find": [f"{word} {i}" for i in range(n)], "test": [f"{word} {i}" for i in range(n, 2 * n)]}
        return {"prompts": prompts}

    sides = {"positive": [rule("owl")], "negative": [rule("mouse")]}
    about = {"kind": "safety", "description": "Owls.", "about": "owl", "license": "Apache-2.0"}
    return Concept(name=name, **about | sides | more)


def pool(texts: list[str], report: Any = None) -> Pooled:
    rng = np.random.default_rng(len(texts))
    is_owl = np.array(["owl" in text for text in texts])
    values = rng.random((len(texts), D_SAE)) * (rng.random((len(texts), D_SAE)) < 0.2)
    values[:, OWN] = is_owl * (0.5 + rng.random(len(texts)))
    raw = rng.normal(size=(len(texts), 6)) + 4 * is_owl[:, None] * np.eye(6)[1]
    matrix = sparse.csr_array(values.astype(np.float32))
    return Pooled(matrix, matrix, raw.astype(np.float32), np.full(len(texts), 3), 0)


def example(kind: str, level: int, text: str, document: int = 0) -> Example:
    return Example(OWN, level, kind, 1.0, document, 0, 0, text.split(" "), [1.0])


EXAMPLES = [
    example("top", 5, "an owl"), example("top", 5, "a mouse"), example("level", 1, "a mouse", document=7),
    example("level", 1, "an owl"), example("level", 2, "an owl"), example("level", 2, "owls"),
]  # fmt: skip


class OwnFeatures(Features):
    def __init__(self) -> None: ...

    def examples(self, feature: int) -> list[Example]:
        return EXAMPLES if feature == OWN else []

    def feature(self, feature: int) -> Any:
        return SimpleNamespace(histogram=[60, 20, 10, 10])

    def sample(self) -> Any:
        return Sample(
            pa.table({"tokens": [["an", " owl"], *[["a", " mouse"]] * 9], "document": list(range(10))}),
            pa.table({name: pa.array([], pa.int64()) for name in ("feature", "window", "place", "value")}),
        )


class OwnAtlas(Atlas):
    def __init__(self) -> None:
        self.features, self.dictionary = FEATURES, "some.dictionary"

    def name(self, feature: int) -> str:
        return f"label|{feature}"

    def beats_control(self, feature: int) -> bool | None:
        return feature % 2 == 0

    def documents_of(self, sources: Collection[str]) -> list[int]:
        return [7] if "an owl's diary" in sources else []


class Reader(PromptReader):
    """Reads without a model."""

    def __init__(self) -> None:
        self.dictionary: Any = SimpleNamespace(d_sae=D_SAE)
        self.window_tokens = 2  # every text has three tokens

    def pool(self, texts: Any, report: Any = None) -> Pooled:
        return pool(texts)


FEATURES = OwnFeatures()
ATLAS, READER = OwnAtlas(), Reader()
STEERS = {OWN: Steers(0.25, "output")}


def one(chosen: Concept) -> ConceptAudit:
    (found,), _ = audit([chosen], SafetySettings(), ATLAS, READER, STEERS)
    return found


def test_a_planted_concept_is_found_and_held_against_the_baselines() -> None:
    found = one(concept())
    assert found.status == "found"
    assert found.best is not None
    assert found.best.separating.feature == OWN
    assert found.best.rated.auc == 1
    assert found.right_rank == 1
    assert found.probe.auc > 0.95
    assert found.words.auc == 1
    assert 0.4 < found.random.mean < 0.6
    said = verdict(found)
    assert "Found: feature 4" in said
    assert "words alone (1.00)" in said
    assert "as well or better" in said
    assert "more than random directions do (output score 0.25)" in said
    assert found.windowed == found.n_texts > 0


def test_specificity_weighs_each_level_by_its_firings() -> None:
    found = specificity(FEATURES, OWN, Judge("owl"), 0.1)
    assert found.share == pytest.approx((80 * 0.5 + 20 * 1.0) / 100)
    assert found.top == 0.5
    assert found.is_own
    assert specificity(FEATURES, OWN + 1, Judge("owl"), 0.1).share is None


def test_where_any_text_may_hold_the_concept_the_token_itself_must_be_of_it() -> None:
    found = specificity(FEATURES, OWN, Judge("owl", "token"), 0.1)  # the first of each: only "owls" is
    assert found.share == pytest.approx((80 * 0 + 20 * 0.5) / 100)
    assert found.top == 0
    assert Judge("owl", "token").share(FEATURES.sample()) == pytest.approx(1 / 20)
    assert Judge("owl").share(FEATURES.sample()) == pytest.approx(1 / 10)
    assert one(concept(where="token")).status == "stand-in"


@pytest.mark.parametrize("where", ["text", "token"])
def test_what_comes_from_a_source_that_is_about_the_concept_is_about_it_whatever_it_says(where: Any) -> None:
    told = concept(where=where, about_sources=["an owl's diary", "a source that this corpus lacks"])
    judge = Judge.of(told, ATLAS)
    assert specificity(FEATURES, OWN, judge, 0.0).share == pytest.approx(
        80 * {"text": 1, "token": 0.5}[where] / 100 + 0.2 * {"text": 1, "token": 0.5}[where]
    )
    assert judge.share(FEATURES.sample()) == pytest.approx({"text": 2 / 10, "token": 3 / 20}[where])
    assert Judge.of(concept(), ATLAS).documents == frozenset()


def test_a_feature_that_fires_on_a_concept_no_more_than_chance_is_not_its_own() -> None:
    judge = Judge("owl|mouse")
    corpus = judge.share(FEATURES.sample())
    assert corpus == 1
    found = specificity(FEATURES, OWN, judge, corpus)
    assert found.share == 1
    assert not found.is_own
    assert "hardly more than anywhere" in verdict(one(concept(about="owl|mouse")))


def test_a_pattern_sees_characters_that_tokens_cut() -> None:
    assert is_about(["\\xd8", "\\xa7", "\\xd9", "\\x84"], "[\u0600-\u06ff]{2}")
    assert not is_about(["\\xd8", "\\xa7"], "xd8")


def test_a_feature_that_fires_on_something_else_in_the_corpus_is_a_stand_in() -> None:
    found = one(concept(about="hawk"))
    assert found.status == "stand-in"
    assert found.right_rank is None
    assert "stands for something else" in verdict(found)


def test_of_too_few_prompts_nothing_is_claimed() -> None:
    found = one(concept(n=39))
    assert found.status == "no claim"
    assert verdict(found).startswith("No claim: 39 prompts on the smallest side, 40 are needed")


def test_two_kinds_that_no_feature_tells_apart_are_not_found() -> None:
    mixed = [{"prompts": {"find": [f"{w} {i}" for i in range(60)], "test": [f"{w} {i}" for i in range(60, 120)]}}
             for w in ("cat", "dog")]  # fmt: skip
    found = one(concept(positive=mixed[:1], negative=mixed[1:]))
    assert found.status == "not found"
    assert verdict(found).startswith("Not found")


def test_text_of_another_origin_is_judged_and_never_used_to_find() -> None:
    shifted = {side: [{"prompts": {"test": [f"{word} far {i}" for i in range(30)]}}]
               for side, word in (("positive", "owl"), ("negative", "crow"))}  # fmt: skip
    found = one(concept(shifted=shifted))
    assert found.best is not None
    assert found.best.shifted is not None
    assert found.best.shifted.auc == 1
    assert found.shifted_probe is not None
    assert "On text of another origin the feature has 1.00" in verdict(found)


def test_a_concept_found_before_and_not_now_is_lost_until_it_is_found_again() -> None:
    found, gone = one(concept("owls")), one(concept("hawks", about="hawk"))
    before = {"names_found": ["owls", "hawks", "removed"], "names_lost": []}
    assert lost_concepts([found, gone], before) == ["hawks"]
    assert lost_concepts([found, gone], {"names_found": ["owls"], "names_lost": ["hawks"]}) == ["hawks"]
    assert lost_concepts([found, gone], {}) == []


def test_the_report_holds_every_concept_and_its_table_has_as_many_cells_in_each_row() -> None:
    audits = [one(concept()), one(concept("few", n=5)), one(concept("hawks", about="hawk"))]
    text = markdown(audits, "some.dictionary", ["hawks"])
    assert all(f"**{a.concept}**" in text for a in audits)
    assert "Lost since the audit before: hawks" in text
    assert "Of 3 concepts: 1 found, 1 stand-in, 1 no claim." in text
    assert "As well as the feature or better: the words alone, for 2 of 2." in text
    rows = [line.replace("\\|", "") for line in text.splitlines() if line.startswith("| ")]
    tables = {row.count("|") for row in rows if "found" in row or "claim" in row or "verdict" in row}
    assert len(tables) == 1
    assert "label\\|4" in text


@pytest.mark.parametrize(("alarms", "off"), [(20, 1.0), (30, 1.5), (10, 2.0), (0, 40.0)])
def test_a_monitor_is_off_by_a_factor_in_either_direction(alarms: int, off: float) -> None:
    measured = Measured(0.05, alarms, 400, 0.0, 1.0, 0, 1)
    assert measured.off == pytest.approx(off)
    assert is_rated(measured)
    assert not is_rated(replace(measured, negatives=40))
    assert not is_rated(None)


def test_the_stage_writes_tables_report_and_monitors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sae_core.safety.audit.PromptReader", SimpleNamespace(of=lambda atlas, lm: READER))
    settings = SafetySettings(concepts=["citation_surnames", "power_seeking"], features=2)
    lm = object.__new__(LanguageModel)
    scores = {"feature": [OWN], "output_score": [0.25], "role": ["output"]}
    (tmp_path / "steering").mkdir()
    pq.write_table(pa.table(scores), tmp_path / "steering" / "scores.parquet")
    summary = build_audit(settings, ATLAS, lm, tmp_path / "steering", tmp_path, {"names_found": ["power_seeking"]})
    assert summary["concepts"] == 2
    assert summary["names_lost"] == ["power_seeking"]
    assert summary["n_lost"] == 1
    rows = pq.read_table(tmp_path / "audit.parquet").to_pylist()
    assert [(row["concept"], row["rank"]) for row in rows] == [
        (name, rank) for name in settings.concepts for rank in (1, 2)
    ]
    told = json.loads((tmp_path / "audit.json").read_text("utf-8"))
    assert [row["concept"] for row in told] == settings.concepts
    assert told[0]["monitor"]["asked"] == 0.05
    assert len(load_detectors(tmp_path / "monitor.json")) == 2
    assert "power_seeking" in (tmp_path / "audit.md").read_text("utf-8")


def test_the_probe_points_along_what_differs_and_words_tell_words_apart() -> None:
    raw = [pool([word] * 50).raw for word in ("owl", "mouse")]
    probe = fit_probe(*raw)
    assert np.argmax(probe.direction) == 1
    assert probe.scores(raw[0]).mean() > probe.scores(raw[1]).mean()
    words = fit_words(["an owl hoots", "the owl"], ["a mouse", "the mouse runs"])
    assert words.decision_function(["owl"])[0] > words.decision_function(["mouse"])[0]


def test_random_features_are_those_that_fire_and_do_as_luck_does() -> None:
    found = random_features(np.arange(5, 30), pool(["owl"] * 60), pool(["mouse"] * 50))
    assert abs(found.mean - 0.5) < 0.05
    assert random_features(np.array([], int), pool(["owl"]), pool(["mouse"])) == Random(0.5, 0.5)


def test_every_shipped_concept_has_a_pattern_that_its_written_positives_match() -> None:
    import re

    for chosen in load_concepts():
        for rule in chosen.positive:
            if rule.templates and chosen.name in ("golden_gate", "immunology"):
                hits = [bool(re.search(chosen.about, text)) for text in rule.templates.find]
                assert np.mean(hits) > 0.5, chosen.name
