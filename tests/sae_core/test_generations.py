"""Generations: what is served stays whole, whatever is made, rolled back, damaged or deleted beside it."""

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sae_core.artifacts import ATLAS, DROPPED, GENERATION, MANIFEST, ArtifactError, ArtifactStore, Draft, Made, Recipe
from sae_core.generations import (
    REFUSED,
    Snapshot,
    collect,
    followed,
    generations,
    outdated,
    refuse,
    roll_back,
    served,
    serving,
    write_generation,
)
from sae_core.verify import verify

SLUG = "d"
Build = Callable[[Draft], dict[str, Any]]


def features(text: str) -> Recipe:
    return Recipe("features", SLUG, 1, {"text": text})


def labels(text: str) -> Recipe:
    return Recipe("labels", SLUG, 1, {}, (features(text),))


def atlas(text: str) -> Recipe:
    return Recipe(ATLAS, SLUG, 1, {}, (features(text), labels(text)))


def written(text: str) -> Build:
    def build(draft: Draft) -> dict[str, Any]:
        (draft.folder / "said").write_text(text)
        return {}

    return build


def make(store: ArtifactStore, text: str, publish: bool = True) -> Made:
    """The tiny pipeline: features, labels of them, and the atlas of both."""
    store.make(features(text), written(text))
    made = store.make(labels(text), written(f"label of {text}"))
    if not publish:
        return made

    def promoted(draft: Draft) -> dict[str, Any]:
        return {"number": write_generation(store, SLUG, draft.parents, draft.folder).number}

    return store.make(atlas(text), promoted)


def said(store: ArtifactStore, stage: str = "features") -> str:
    return (served(store, SLUG).get(stage, SLUG).folder / "said").read_text()


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path)


def test_readers_see_the_last_whole_generation_while_the_next_one_is_being_made(store: ArtifactStore) -> None:
    make(store, "one")
    make(store, "two", publish=False)
    assert (said(store), said(store, "labels")) == ("one", "label of one")
    make(store, "two")
    assert (said(store), said(store, "labels")) == ("two", "label of two")
    assert [(g.number, g.follows) for g in generations(store, SLUG)] == [(1, 0), (2, 1)]


def test_what_is_wanted_again_is_taken_from_the_generation_that_kept_it_and_nothing_is_written_there(
    store: ArtifactStore,
) -> None:
    make(store, "one")
    make(store, "two")

    def never(draft: Draft) -> dict[str, Any]:
        raise AssertionError(f"built again in {draft.folder}")

    assert store.make(features("one"), never).cached
    assert store.make(labels("one"), never).cached
    assert store.make(atlas("one"), never).cached
    assert said(store) == "one"


def test_a_stage_made_again_by_hand_does_not_change_what_readers_see_but_labels_do(store: ArtifactStore) -> None:
    make(store, "one")
    store.make(features("one"), written("another"), again=True)
    assert said(store) == "one"
    for n in range(3):
        made = store.make(labels("one"), written(f"more labels {n}"), again=True)
        assert made.folder.name != generations(store, SLUG)[0].manifests[f"labels/{SLUG}"].folder
        assert said(store, "labels") == f"more labels {n}"


def test_what_is_made_after_an_atlas_is_seen_with_the_generation_that_it_was_made_from(store: ArtifactStore) -> None:
    make(store, "one")
    safety = Recipe("safety", SLUG, 1, {}, (features("one"),))
    store.make(safety, written("audit"))
    store.make(Recipe("behaviors", SLUG, 1, {}, (features("one"), safety)), written("report of the audit"))
    assert said(store, "safety") == "audit"
    assert said(store, "behaviors") == "report of the audit"
    store.make(safety, written("another audit"), again=True)
    assert said(store, "behaviors") == "report of the audit"  # the same audit, by its fingerprint
    make(store, "two")
    for stage in ("safety", "behaviors"):
        assert served(store, SLUG).manifest(stage, SLUG) is None


def test_a_generation_holds_what_it_was_made_from_even_if_that_was_made_anew_meanwhile(store: ArtifactStore) -> None:
    store.make(features("one"), written("one"))
    store.make(labels("one"), written("label of one"))

    def promoted(draft: Draft) -> dict[str, Any]:
        store.make(features("two"), written("two"))
        write_generation(store, SLUG, draft.parents, draft.folder)
        return {}

    store.make(atlas("one"), promoted)
    of = generations(store, SLUG)[0].manifests
    assert of[f"labels/{SLUG}"].parents[f"features/{SLUG}"] == of[f"features/{SLUG}"].fingerprint


def test_a_run_killed_before_its_promotion_counts_as_no_generation(store: ArtifactStore) -> None:
    make(store, "one", publish=False)

    def killed(draft: Draft) -> dict[str, Any]:
        write_generation(store, SLUG, draft.parents, draft.folder)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.make(atlas("one"), killed)
    assert not generations(store, SLUG)
    assert serving(store, SLUG) is None
    assert make(store, "one").manifest.summary == {"number": 1}


def test_going_back_passes_over_what_was_rolled_back_before(store: ArtifactStore) -> None:
    for text in ("one", "two"):
        make(store, text)
    assert roll_back(store, SLUG).number == 1
    make(store, "three")
    assert said(store) == "three"
    assert generations(store, SLUG)[-1].follows == 1
    assert roll_back(store, SLUG).number == 1
    assert said(store) == "one"
    with pytest.raises(ArtifactError, match="nothing to go back to"):
        roll_back(store, SLUG)


def test_going_back_skips_a_generation_that_has_lost_a_file(store: ArtifactStore) -> None:
    for text in ("one", "two", "three"):
        make(store, text)
    (generations(store, SLUG)[1].folder.parents[2] / "features" / SLUG / features("two").fingerprint / "said").unlink()
    assert roll_back(store, SLUG).number == 1


def test_old_generations_are_deleted_with_what_only_they_are_made_of(store: ArtifactStore) -> None:
    for text in ("one", "two", "three"):
        make(store, text)
    gone = outdated(store, keep=1)
    assert len(gone) == 6
    assert sorted(collect(store, keep=1)) == sorted(gone)
    assert not any(path.exists() for path in gone)
    assert [g.number for g in generations(store, SLUG)] == [3]
    assert said(store) == "three"
    assert not outdated(store, keep=1)


def test_what_is_read_is_kept_and_so_is_what_a_killed_run_can_go_on_from(store: ArtifactStore) -> None:
    make(store, "one")
    reader = served(store, SLUG)
    make(store, "two")
    draft = store.root / "features" / SLUG / "unfinished"
    draft.mkdir()
    assert collect(store, keep=1) == []
    assert (reader.get("features", SLUG).folder / "said").read_text() == "one"
    del reader
    assert len(collect(store, keep=1)) == 3
    assert draft.is_dir()


def test_a_deletion_that_was_killed_half_way_is_gone_on_with(store: ArtifactStore) -> None:
    for text in ("one", "two"):
        make(store, text)
    old = generations(store, SLUG)[0]
    (old.folder / GENERATION).rename(old.folder / DROPPED)  # what is done first
    assert [g.number for g in generations(store, SLUG)] == [2]
    assert len(collect(store, keep=1)) == 3
    assert not old.folder.exists()


def test_readers_and_deletions_at_once_never_meet_a_generation_that_is_half_there(store: ArtifactStore) -> None:
    make(store, "0")
    failed: list[BaseException] = []
    done = threading.Event()

    def read() -> None:
        try:
            while not done.is_set():
                seen = served(store, SLUG)
                texts = {(seen.get(s, SLUG).folder / "said").read_text().split()[-1] for s in ("features", "labels")}
                assert len(texts) == 1
        except BaseException as error:  # noqa: BLE001 - told below
            failed.append(error)

    readers = [threading.Thread(target=read) for _ in range(3)]
    for reader in readers:
        reader.start()
    for n in range(1, 30):
        make(store, str(n))
        collect(store, keep=1)
    done.set()
    for reader in readers:
        reader.join()
    assert not failed
    assert len(generations(store, SLUG)) <= 4  # the served one, and one for each reader at most


@pytest.mark.parametrize("damage", ["", '{"number": 2, "manif', "[]"])
def test_a_damaged_generation_is_not_served_deletes_nothing_and_is_mended_by_the_next_run(
    store: ArtifactStore, damage: str
) -> None:
    make(store, "one")
    whole = make(store, "two")
    (whole.folder / GENERATION).write_text(damage)
    assert said(store) == "one"
    make(store, "three", publish=False)
    assert not outdated(store, keep=1)
    assert store.manifest("features", SLUG) != whole.manifest
    again = make(store, "two")
    assert said(store) == "two"
    assert [(g.number, g.follows) for g in generations(store, SLUG)] == [(1, 0), (2, 1)]
    assert not store.damage(again.manifest, full=True)


@pytest.mark.parametrize("damage", ["", '{"stage": "atl'])
def test_a_damaged_manifest_of_an_atlas_is_repaired_and_readers_do_not_notice(
    store: ArtifactStore, damage: str
) -> None:
    for text in ("one", "two"):
        make(store, text)
    roll_back(store, SLUG)
    (store.root / ATLAS / SLUG / MANIFEST).write_text(damage)
    assert said(store) == "one"
    assert any("damaged" in json.dumps(v.damage) for v in verify(store, repair=True))
    assert said(store) == "one"
    make(store, "one")
    assert said(store) == "one"


def test_verify_reads_what_older_generations_keep_too(store: ArtifactStore) -> None:
    for text in ("one", "two"):
        make(store, text)
    (store.root / "features" / SLUG / features("one").fingerprint / "said").write_text("ONE")
    broken = [verdict for verdict in verify(store, repair=True) if verdict.damage]
    assert [v.artifact for v in broken] == [f"features/{SLUG} ({features('one').fingerprint})"]
    with pytest.raises(ArtifactError, match="nothing to go back to"):
        roll_back(store, SLUG)


def test_what_is_mended_follows_what_it_followed_when_it_was_made(store: ArtifactStore) -> None:
    for text in ("one", "two"):
        make(store, text)
    first, second = generations(store, SLUG)
    assert followed(store, SLUG, "another") == second
    assert followed(store, SLUG, features("two").fingerprint) == first
    shutil.rmtree(store.root / "features" / SLUG / features("two").fingerprint)
    assert followed(store, SLUG, features("two").fingerprint) == first


def test_foreign_files_in_the_store_disturb_nothing(store: ArtifactStore) -> None:
    for text in ("one", "two"):
        make(store, text)
    (store.root / "notes.txt").write_text("mine")
    (store.root / "mine").mkdir()
    (store.root / "mine" / SLUG).write_text("a file where a folder is looked for")
    (store.root / "features" / "notes.txt").write_text("mine")
    (store.root / "features" / SLUG / "my folder").mkdir()
    (store.root / ATLAS / "notes.txt").write_text("mine")
    (store.root / ATLAS / SLUG / "my folder").mkdir()
    make(store, "three")
    collect(store, keep=1)
    assert said(store) == "three"
    assert (store.root / "mine" / SLUG).exists()


def test_a_list_of_refusals_that_is_damaged_says_what_to_do(store: ArtifactStore) -> None:
    make(store, "one")
    refuse(store, SLUG, "a", "worse")
    refuse(store, SLUG, "b", "worse still")
    path = store.root / ATLAS / SLUG / REFUSED
    assert json.loads(path.read_text()) == {"a": "worse", "b": "worse still"}
    path.write_text("{")
    with pytest.raises(ArtifactError, match="delete it"):
        served(store, SLUG)


def test_a_generation_can_be_read_where_nothing_can_be_written(store: ArtifactStore) -> None:
    make(store, "one")
    before = sorted(store.root.rglob("*"))
    assert isinstance(served(store, SLUG), Snapshot)
    assert sorted(store.root.rglob("*")) == before


def test_only_one_run_makes_things_at_a_time(store: ArtifactStore) -> None:
    with store.lock(), pytest.raises(ArtifactError, match="is being written by a run"), store.lock(wait=False):
        pass
