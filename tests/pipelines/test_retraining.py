"""A study made again and again, as its text changes: what is kept, what is refused, what a reader sees."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import dagster as dg
import pyarrow.parquet as pq
import pytest

from assets.partitions import STUDIES
from assets.resources import Workshop
from pipelines.run import bring_up_to_date, plan
from sae_core.artifacts import ATLAS, ArtifactError, ArtifactStore
from sae_core.atlas import Atlas
from sae_core.generations import generations, outdated, roll_back, served
from sae_core.lineage import LINEAGE

SLUG = STUDIES.get("tiny").spec(STUDIES.get("tiny").dictionaries[0]).slug


class Workplace:
    """A store of its own, and a corpus that may change."""

    def __init__(self, root: Path, text: Path, instance: dg.DagsterInstance) -> None:
        self.text, self.instance = text, instance
        self.workshop = Workshop(root=str(root), device="cpu")
        self.store = ArtifactStore(root)

    def refresh(self) -> dict[str, str]:
        """Bring the tiny study up to date: what each stage was."""
        steps = bring_up_to_date(STUDIES.get("tiny"), self.workshop, self.instance, log_level="CRITICAL")
        return {recipe.stage: status.state for recipe, status in steps}

    def write(self, name: str, text: str) -> None:
        (self.text / name).write_text(text, "utf-8")


@pytest.fixture(scope="module")
def place(tiny_study: Path, text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workplace]:
    kept = tmp_path_factory.mktemp("kept") / "text"
    shutil.copytree(text_folder, kept)
    with dg.DagsterInstance.ephemeral() as instance:
        yield Workplace(tmp_path_factory.mktemp("store"), text_folder, instance)
    shutil.rmtree(text_folder)
    shutil.copytree(kept, text_folder)


def test_a_first_atlas_is_served_and_a_second_run_makes_nothing(place: Workplace) -> None:
    assert place.refresh()[ATLAS] == "missing"
    assert [g.number for g in generations(place.store, SLUG)] == [1]
    assert set(place.refresh().values()) == {"made"}


def test_new_text_makes_a_new_generation_whose_features_keep_their_numbers(place: Workplace) -> None:
    place.write("60.txt", "Number 60. The bridge fell into the river, and nobody in the city slept.\n" * 3)
    assert place.refresh()[ATLAS] == "stale"
    assert [g.number for g in generations(place.store, SLUG)] == [1, 2]
    lineage = pq.read_table(place.store.get("dictionary", SLUG).folder / LINEAGE).to_pylist()
    kept = [row for row in lineage if row["fate"] in {"kept", "moved"}]
    assert len(kept) > 32
    assert all(row["feature"] == row["previous"] for row in kept)
    assert {row["generation"] for row in lineage} == {2}


def test_a_corpus_gone_bad_is_refused_once_and_readers_see_the_old_atlas_whole(place: Workplace) -> None:
    before = Atlas(place.store, SLUG).feature(0)
    good = {path.name: path.read_text("utf-8") for path in place.text.iterdir()}
    for i, path in enumerate(sorted(place.text.iterdir())):
        path.write_text(f"{i} " + "".join(chr(33 + (i * 31 + n * n * 7) % 90) for n in range(300)), "utf-8")
    with pytest.raises(Exception, match="is not promoted, what is served stays"):
        place.refresh()
    status = {recipe.stage: status for recipe, status in plan(STUDIES.get("tiny"), place.store)}
    assert status[ATLAS].state == "refused"
    assert "FVU" in status[ATLAS].why
    assert place.refresh()[ATLAS] == "refused"  # and not tried again
    assert Atlas(place.store, SLUG).feature(0) == before
    assert served(place.store, SLUG).get("features", SLUG) != place.store.get("features", SLUG)
    for name, text in good.items():
        place.write(name, text)
    assert place.refresh()[ATLAS] == "made"  # what is wanted again is what is served


def test_rolling_back_serves_the_generation_before_and_the_newer_one_is_not_promoted_again(place: Workplace) -> None:
    assert roll_back(place.store, SLUG).number == 1
    assert served(place.store, SLUG).get("features", SLUG).folder.is_dir()
    assert place.refresh()[ATLAS] == "refused"
    with pytest.raises(ArtifactError, match="nothing to go back to"):
        roll_back(place.store, SLUG)


def test_what_is_served_or_read_is_never_collected(place: Workplace) -> None:
    reader = Atlas(place.store, SLUG)
    gone = outdated(place.store, keep=1)
    assert reader.store.get("features", SLUG).folder not in gone
    assert place.store.get("dictionary", SLUG).folder not in gone
    for folder in gone:
        shutil.rmtree(folder)
    assert reader.feature(0).row.feature == 0
    assert not outdated(place.store, keep=1)
