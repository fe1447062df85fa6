"""What an artifact's fingerprint is made of."""

import shutil
from pathlib import Path

from sae_core.artifacts import Recipe
from sae_core.stages import recipes
from sae_core.study_files import load_study

STUDY = """
model.source = "smollm2-135m-instruct"
corpus.sources = ["wiki-en"]
activations.layer = 3
"""


def dictionary(folder: Path, source: str = "") -> Recipe:
    (folder / "mine.toml").write_text(STUDY + (f'dictionary.source = "{source}"' if source else ""), "utf-8")
    study = load_study(folder / "mine.toml")
    return next(recipe for recipe in recipes(study) if recipe.stage == "dictionary")


def test_an_imported_dictionary_is_made_again_when_and_only_when_its_files_change(tmp_path: Path) -> None:
    (tmp_path / "here" / "sae").mkdir(parents=True)
    (tmp_path / "here" / "sae" / "ae.pt").write_bytes(b"one")
    shutil.copytree(tmp_path / "here", tmp_path / "there")
    here = dictionary(tmp_path / "here", source="./sae").fingerprint
    assert dictionary(tmp_path / "there", source="./sae").fingerprint == here
    assert dictionary(tmp_path).fingerprint != here
    (tmp_path / "there" / "sae" / "ae.pt").write_bytes(b"other")
    assert dictionary(tmp_path / "there", source="./sae").fingerprint != here


def test_a_trained_dictionary_keeps_the_fingerprint_it_had_before_there_were_imports(tmp_path: Path) -> None:
    assert "source" not in dictionary(tmp_path).settings
