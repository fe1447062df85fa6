"""A study made again and again, as its text changes: what is kept, what is refused, what a reader sees."""

from typing import Any

import pyarrow.parquet as pq
import pytest

from assets.partitions import STUDIES
from pipelines.run import materialize, plan
from sae_core.artifacts import ATLAS, ArtifactError
from sae_core.atlas import Atlas
from sae_core.generations import generations, outdated, roll_back, served
from sae_core.lineage import LINEAGE

SLUG = STUDIES.get("tiny").spec(STUDIES.get("tiny").dictionaries[0]).slug


def test_a_first_atlas_is_served_and_a_second_run_makes_nothing(place: Any) -> None:
    assert place.refresh()[ATLAS] == "missing"
    assert [g.number for g in generations(place.store, SLUG)] == [1]
    assert set(place.refresh().values()) == {"made"}


def test_new_text_makes_a_new_generation_whose_features_keep_their_numbers(place: Any) -> None:
    place.write("60.txt", "Number 60. The bridge fell into the river, and nobody in the city slept.\n" * 3)
    assert place.refresh()[ATLAS] == "stale"
    assert [g.number for g in generations(place.store, SLUG)] == [1, 2]
    lineage = pq.read_table(place.store.get("dictionary", SLUG).folder / LINEAGE).to_pylist()
    kept = [row for row in lineage if row["fate"] in {"kept", "moved"}]
    assert len(kept) > 32
    assert all(row["feature"] == row["previous"] for row in kept)
    assert {row["generation"] for row in lineage} == {2}


def test_a_corpus_gone_bad_is_refused_once_and_readers_see_the_old_atlas_whole(place: Any) -> None:
    before = Atlas(place.store, SLUG).feature(0)
    good = place.spoil()
    with pytest.raises(Exception, match="is not promoted, what is served stays"):
        place.refresh()
    status = {recipe.stage: status for recipe, status in plan(STUDIES.get("tiny"), place.store)}
    assert status[ATLAS].state == "refused"
    assert "FVU" in status[ATLAS].why
    assert place.refresh()[ATLAS] == "refused"  # and not tried again
    assert Atlas(place.store, SLUG).feature(0) == before
    assert served(place.store, SLUG).get("features", SLUG) != place.store.get("features", SLUG)
    labels = place.store.get("labels", SLUG).folder.stat().st_mtime_ns
    with pytest.raises(Exception, match="for a retraining that is not served"):
        materialize("labels", SLUG, STUDIES.get("tiny"), place.workshop, place.instance, "CRITICAL", only=[1])
    assert place.store.get("labels", SLUG).folder.stat().st_mtime_ns == labels
    for name, text in good.items():
        place.write(name, text)
    folder = served(place.store, SLUG).get("dictionary", SLUG).folder
    written = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert place.refresh()[ATLAS] == "made"  # what is wanted again is what is served
    assert place.store.get("dictionary", SLUG).folder == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == written  # and was not made again


def test_rolling_back_serves_the_generation_before_and_the_newer_one_is_not_promoted_again(place: Any) -> None:
    assert roll_back(place.store, SLUG).number == 1
    assert served(place.store, SLUG).get("features", SLUG).folder.is_dir()
    assert place.refresh()[ATLAS] == "refused"
    with pytest.raises(ArtifactError, match="nothing to go back to"):
        roll_back(place.store, SLUG)


def test_what_is_served_is_never_collected(place: Any) -> None:
    reader = Atlas(place.store, SLUG)
    gone = outdated(place.store, keep=1)
    assert reader.store.get("features", SLUG).folder not in gone
    assert place.store.get("dictionary", SLUG).folder not in gone
