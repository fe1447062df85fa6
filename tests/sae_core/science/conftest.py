"""A real sweep of tiny runs on the tiny model's activations."""

from pathlib import Path

import pytest

from sae_core.activations import Activations, harvest
from sae_core.corpus import build_corpus
from sae_core.science.scaling import Scaling, build_scaling
from sae_core.study import ActivationSettings, CorpusSettings, DictionarySettings, ModelSettings, ScalingSettings

SWEEP = ScalingSettings(
    d_sae=[16, 32, 64], tokens=[2048, 4096, 8192], k=[2, 6], lr_factors=[0.5], evaluation_tokens=512, resamples=20
)
WHERE = ActivationSettings(layer=1, precision="float32", shard_tokens=1024)
BASE = DictionarySettings(k=4, batch_tokens=64)


@pytest.fixture(scope="session")
def text(tiny_model: Path, text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the corpus."""
    folder = tmp_path_factory.mktemp("corpus")
    settings = CorpusSettings.model_validate(
        {"name": "t", "sources": [str(text_folder)], "tokens": 20_000, "block_tokens": 32, "held_out": 0.2}
    )
    build_corpus(settings, ModelSettings(source=str(tiny_model)), folder)
    return folder


@pytest.fixture(scope="session")
def site(tiny_model: Path, text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of activations of the tiny model."""
    folder = tmp_path_factory.mktemp("activations")
    harvest(WHERE, ModelSettings(source=str(tiny_model)), text, folder)
    return folder


@pytest.fixture(scope="session")
def source(site: Path) -> Activations:
    return Activations.open(site)


@pytest.fixture(scope="session")
def swept(site: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict]:
    """Folder of a finished sweep, and its summary."""
    folder = tmp_path_factory.mktemp("scaling")
    return folder, build_scaling(SWEEP, BASE, site, folder)


@pytest.fixture(scope="session")
def scaling(swept: tuple[Path, dict]) -> Scaling:
    return Scaling.open(swept[0] / "scaling.json")
