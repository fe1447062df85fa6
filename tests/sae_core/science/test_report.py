"""All claims on a tiny sweep: every row is there, and what they say is what was measured."""

import json
from pathlib import Path

import pytest

from sae_core.science.findings import Given
from sae_core.science.report import build_science
from sae_core.study import LabelSettings, ModelSettings, ScienceSettings
from tests.sae_core.science.conftest import WHERE

SETTINGS = ScienceSettings(
    tokens=2048, twins=32, neuron_tokens=1024, neuron_features=20, control_tokens=2048, families=2,
    architectures=["batch_top_k", "relu"],
)  # fmt: skip


@pytest.fixture(scope="module")
def made(
    text: Path, site: Path, swept: tuple[Path, dict], tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Folder of the report of the tiny sweep."""
    folder = tmp_path_factory.mktemp("science")
    given = Given(ModelSettings(source=str(tiny_model)), WHERE, swept[0], site, text, LabelSettings())
    summary = build_science(SETTINGS, given, folder)
    assert summary["claims"] == sum(summary[verdict] for verdict in ("holds", "does not", "cannot_tell"))
    return folder


def test_every_question_of_the_papers_has_rows_in_the_table(made: Path):
    claims = [row["claim"] for row in json.loads((made / "science.json").read_text("utf-8"))["claims"]]
    for part in (
        "the loss at the best size", "two seeds of relu", "split into", "silent where another one absorbed it",
        "has a feature when it is frequent", "features are not neurons", "easier to name than neurons",
        "shuffled weights", "log-likelihood ratio of DNA",
    ):  # fmt: skip
        assert any(part in claim for claim in claims), part
    assert len(set(claims)) == len(claims)
    text = (made / "science.md").read_text("utf-8")
    assert all(f"| {claim} |" in text for claim in claims)
    assert "\nneurons: " in text
