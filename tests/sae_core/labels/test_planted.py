"""Features of known meaning, marked in real text: does the local label writer name them, and does it judge names well?

Run on request (`-m label_model`): the label writer is a file of 1.1 GB, and takes some minutes.
"""

import asyncio
import os
import random
import re
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sae_core.corpus.documents import Skipped, read_documents
from sae_core.features import Features
from sae_core.labels import Labels, build_labels
from sae_core.labels.build import Ground
from sae_core.labels.endpoint import label_writer
from sae_core.labels.reader import LabelRow
from sae_core.labels.scoring.score import score_labels
from sae_core.progress import silent
from sae_core.study import LabelSettings, ModelSettings, Source

pytestmark = [pytest.mark.label_model, pytest.mark.timeout(3600)]
CACHE = os.environ.get("MIND_ATLAS_CACHE")  # before a fixture sets one that is empty


class Concept(NamedTuple):
    """What a planted feature fires on, and how a label says so."""

    meaning: str
    sources: tuple[str, ...]
    rule: str
    """Matches the tokens on which it fires, in text of these sources."""
    said_by: str
    """A label names the concept when this is found in it."""


ENGLISH = ("wiki-en", "recipes-en", "factbook")
CONCEPTS = (
    Concept("Russian, in Cyrillic script", ("bible-ru",), "[а-яё]{3}", "russia|cyrillic"),
    Concept("digits", ENGLISH, r"\d", "digit|number|numer"),
    Concept(
        "Python keywords", ("sympy-code",), r"\b(def|return|import|from|class|if|elif|else|for|raise|not|lambda)\b",
        "python|keyword|programming|code",
    ),
    Concept("days of the week", ENGLISH, r"\b(Mon|Tues|Wednes|Thurs|Fri|Satur|Sun)day", r"\bdays?\b|week"),
    Concept("French text", ("wiki-fr",), r"\w{4}", "french"),
    Concept("Spanish text", ("wiki-es",), r"\w{4}", "spanish"),
    Concept("months", ENGLISH, r"\b(January|February|March|April|June|July|August|September|October)\b", "month"),
    Concept("colors", ENGLISH, r"\b(red|blue|green|yellow|black|white|brown|purple|pink)\b", "colou?r"),
    Concept("points of the compass", ENGLISH, r"\b(north|south|east|west)(ern)?\b", "direction|compass|cardinal"),
    Concept("family members", ENGLISH, r"\b(father|mother|son|daughter|brother|sister|wife|husband)s?\b",
            "famil|relati|kin"),
    Concept("opening parentheses", ENGLISH, r"\(", "parenthes|bracket"),
    Concept("ingredients", ("recipes-en",), r"\b(flour|sugar|butter|salt|pepper|milk|eggs?|garlic|onions?|oil)\b",
            "ingredient|cook|bak|food|recipe"),
)  # fmt: skip
DEFAULT = LabelSettings().model
OTHERS = ("smollm2-135m-instruct", "gemma3-270m", "qwen2.5-coder-0.5b-instruct")
JUDGED = ("digits", "French text", "months")
SOURCES = sorted({source for concept in CONCEPTS for source in concept.sources})
N_EXAMPLES, N_WINDOWS, LEVELS = 30, 40, 5
AROUND = 80  # characters of a text on both sides of a place
TOKEN = re.compile(r"\s?[^\W\d_]+|\d|\s?[^\w\s]|\s+|_+")


class Window(NamedTuple):
    source: str
    document: int
    tokens: list[str]


@pytest.fixture(scope="session")
def planted_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of features and neighbors: feature i fires where concept i's rule matches, with strengths by chance."""
    with pytest.MonkeyPatch.context() as patch:
        if CACHE:
            patch.setenv("MIND_ATLAS_CACHE", CACHE)
        else:
            patch.delenv("MIND_ATLAS_CACHE", raising=False)
        texts = {source: _texts(source) for source in SOURCES}
    draw, folder = random.Random(0), tmp_path_factory.mktemp("planted-text")
    kept = [
        _passage(source, number, text, draw.randrange(len(text)))
        for source in SOURCES for number, text in draw.sample(texts[source], N_WINDOWS)
    ]  # fmt: skip
    rows, examples, firings = [], [], []
    for feature, concept in enumerate(CONCEPTS):
        passages = _passages(concept, texts, draw)
        found = [(window, acts) for window in passages if any(acts := _acts(concept, window, draw))][:N_EXAMPLES]
        assert len(found) == N_EXAMPLES, f"{concept.meaning}: {len(found)} texts"
        examples += sorted((_example(feature, *pair) for pair in found), key=lambda e: (-e["level"], -e["act"]))
        rows.append(_feature(feature, found))
        for number, window in enumerate(kept):
            firings += [(feature, number, i, a) for i, a in enumerate(_acts(concept, window, draw)) if a]
    neighbors = [
        {"feature": i, "rank": r, "neighbor": (i + r) % len(CONCEPTS), "cosine": 0.5}
        for i in range(len(CONCEPTS)) for r in (1, 2)
    ]  # fmt: skip
    windows = [{"window": i, "document": w.document, "tokens": w.tokens} for i, w in enumerate(kept)]
    named = [dict(zip(("feature", "window", "place", "value"), firing, strict=True)) for firing in firings]
    tables = {"features": rows, "examples": examples, "neighbors": neighbors, "windows": windows, "firings": named}
    for name, table in tables.items():
        pq.write_table(pa.Table.from_pylist(table), folder / f"{name}.parquet")
    return folder


def _texts(source: str) -> list[tuple[int, str]]:
    """Documents by number, all sources' numbers apart."""
    documents = islice(read_documents(Source(source=source), 20_000, Skipped()), 1500)
    long = (document.text for document in documents if len(document.text) > 2 * AROUND)
    return [(10_000 * SOURCES.index(source) + i, text) for i, text in enumerate(long)]


def _passages(concept: Concept, texts: dict[str, list[tuple[int, str]]], draw: random.Random) -> Iterator[Window]:
    """Passages around places where the rule matches, one of each document, documents in random order."""
    every = [(source, number, text) for source in concept.sources for number, text in texts[source]]
    rule = re.compile(concept.rule)
    for source, number, text in draw.sample(every, len(every)):
        if found := rule.search(text, draw.randrange(len(text))) or rule.search(text):
            yield _passage(source, number, text, found.start())


def _passage(source: str, number: int, text: str, at: int) -> Window:
    return Window(source, number, TOKEN.findall(text[max(0, at - AROUND) : at + AROUND])[1:-1])


def _acts(concept: Concept, window: Window, draw: random.Random) -> list[float]:
    """Strengths of up to 10, where the feature fires."""
    if window.source not in concept.sources:
        return [0.0] * len(window.tokens)
    strength = draw.uniform(1, 10)
    return [strength * draw.uniform(0.8, 1) * bool(re.search(concept.rule, token)) for token in window.tokens]


def _example(feature: int, window: Window, acts: list[float]) -> dict[str, Any]:
    most = max(acts)
    return {
        "feature": feature, "level": min(LEVELS, 1 + int(most / 10 * LEVELS)), "kind": "level", "act": most,
        "document": window.document, "position": 0, "peak": acts.index(most), "tokens": window.tokens, "acts": acts,
    }  # fmt: skip


def _feature(feature: int, found: list[tuple[Window, list[float]]]) -> dict[str, Any]:
    """What statistics would say; `promoted` are the tokens that follow most often, as there is no decoder."""
    fired = Counter(t for window, acts in found for t, a in zip(window.tokens, acts, strict=True) if a)
    after = Counter(t for w, acts in found for t, a in zip(w.tokens[1:], acts, strict=False) if a and t.strip())
    top, promoted = fired.most_common(8), [token for token, _ in after.most_common(8)]
    return {
        "feature": feature, "n_fired": 1000, "density": 0.001, "max_act": 10.0, "mean_act": 5.0, "is_dead": False,
        "promoted": promoted, "promoted_logits": [1.0] * len(promoted), "suppressed": [" the"],
        "suppressed_logits": [-1.0], "histogram": [5] * 20, "top_tokens": [token for token, _ in top],
        "top_token_shares": [n / fired.total() for _, n in top],
    }  # fmt: skip


@pytest.fixture
def local(cache: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """The real cache, in which the models lie."""
    if "label_model" not in request.config.option.markexpr:
        pytest.skip("asks the local label writer, 1.1 GB and some minutes: run it with -m label_model")
    if CACHE:
        monkeypatch.setenv("MIND_ATLAS_CACHE", CACHE)
    else:
        monkeypatch.delenv("MIND_ATLAS_CACHE")


@lru_cache
def written_by(model: str, planted: Path) -> tuple[float, float]:
    """The shares of a writer's labels that name the concept: of the feature's own, and of the others' in its place."""
    settings = LabelSettings(features=len(CONCEPTS), scorers=["embedding"], model=model)
    folder, ground = planted.with_name(f"by-{model}"), Ground(ModelSettings(source="smollm2-135m-instruct"), planted)
    folder.mkdir()
    summary = build_labels(settings, planted, folder, ground=ground)
    rows = Labels.open(folder).rows()
    names = [[bool(re.search(concept.said_by, row.label.casefold())) for row in rows] for concept in CONCEPTS]
    n = len(CONCEPTS)
    share = sum(names[i][i] for i in range(n)) / n
    control = sum(names[i][j] for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    for i, (concept, row) in enumerate(zip(CONCEPTS, rows, strict=True)):
        said = [(s.scorer, s.score, s.shuffled, s.lexical) for s in row.scores]
        print(f"{concept.meaning} | {row.label} | {row.status} | {names[i][i]} | {row.beats_control} | {said}")
    print(f"{model}: {share:.3f} name the concept, {control:.3f} of shuffled; {summary['seconds_per_label']} s a label")
    return share, control


def test_labels_of_planted_features_name_the_concept_and_shuffled_ones_do_not(local, planted_text):
    share, control = written_by(DEFAULT, planted_text)
    assert share >= 0.5
    assert control <= 0.15


@pytest.mark.parametrize("model", OTHERS)
def test_no_smaller_model_of_the_catalog_names_as_many(local, planted_text, model):
    assert written_by(model, planted_text)[0] < written_by(DEFAULT, planted_text)[0]


@pytest.mark.parametrize("task", ["detection", "fuzzing"])
def test_the_local_judge_tells_true_names_from_shuffled_ones(local, planted_text, task, tiny_embedder):
    told = [i for i, concept in enumerate(CONCEPTS) if concept.meaning in JUDGED]
    rows = [LabelRow(i, "", "written", CONCEPTS[i].meaning, examples=(0, 1)) for i in told]
    settings, notes = LabelSettings(scorers=[task], judged=len(rows), embedder=str(tiny_embedder)), []

    async def work() -> dict[int, dict[str, Any]]:
        with label_writer(settings, "none", silent) as client:
            try:
                features = Features.open(planted_text)
                scored = await score_labels(client, rows, [], features, settings, planted_text, notes.append, 1, silent)
                return scored.fields
            finally:
                await client.close()

    scores = [fields["scores"][0] for fields in asyncio.run(work()).values()]
    for meaning, score in zip(JUDGED, scores, strict=True):
        print(task, meaning, score.score, score.shuffled, score.failed, score.levels)
    assert len(notes) == 24 * 2 * len(told)  # each of twelve texts a side by itself; no lexical name is given
    print(f"{sum(note['seconds'] for note in notes) / len(notes):.2f} s a question", len(notes))
    assert sum(score.failed for score in scores) / len(scores) <= 0.1
    own, other = (fmean(getattr(score, name) for score in scores) for name in ("score", "shuffled"))
    assert own >= 0.6
    assert own > other + 0.05  # months and digits stand in the same texts: one is not all wrong under the other's name
