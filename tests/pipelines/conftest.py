"""A place where the tiny study can be made again and again, as its text changes."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pytest


class Workplace:
    """A store of its own, and a corpus that may change."""

    def __init__(self, root: Path, text: Path, instance: dg.DagsterInstance) -> None:
        from assets.resources import Workshop
        from sae_core.artifacts import ArtifactStore

        self.text, self.instance = text, instance
        self.workshop = Workshop(root=str(root), device="cpu")
        self.store = ArtifactStore(root)

    def refresh(self) -> dict[str, str]:
        """Bring the tiny study up to date: what each stage was."""
        from assets.partitions import STUDIES
        from pipelines.run import bring_up_to_date

        steps = bring_up_to_date(STUDIES.get("tiny"), self.workshop, self.instance, log_level="CRITICAL")
        return {recipe.stage: status.state for recipe, status in steps}

    def write(self, name: str, text: str) -> None:
        (self.text / name).write_text(text, "utf-8")

    def spoil(self) -> dict[str, str]:
        """Put gibberish in place of all text; returns what was there, by file."""
        good = {path.name: path.read_text("utf-8") for path in self.text.iterdir()}
        for i, name in enumerate(sorted(good)):
            self.write(name, f"{i} " + "".join(chr(33 + (i * 31 + n * n * 7) % 90) for n in range(300)))
        return good


@pytest.fixture(scope="module")
def place(tiny_study: Path, text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    kept = tmp_path_factory.mktemp("kept") / "text"
    shutil.copytree(text_folder, kept)
    with dg.DagsterInstance.ephemeral() as instance:
        yield Workplace(tmp_path_factory.mktemp("store"), text_folder, instance)
    shutil.rmtree(text_folder)
    shutil.copytree(kept, text_folder)
