import json
import multiprocessing as mp
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest

from sae_core.artifacts import SCRATCH, ArtifactError, ArtifactStore, Draft, Recipe, require_space, write_atomically

TEXT = Recipe("text", "a", 1, {"words": 3})
COUNT = Recipe("count", "a", 1, {}, (TEXT,))


@pytest.fixture
def store(tmp_path: Path) -> ArtifactStore:
    return ArtifactStore(tmp_path)


def write_text(draft: Draft) -> dict:
    with write_atomically(draft.folder / "text.txt") as path:
        path.write_text("word " * draft.recipe.settings["words"])
    return {"words": draft.recipe.settings["words"]}


def count_words(draft: Draft) -> dict:
    text = (draft.parents["text"].folder / "text.txt").read_text()
    with write_atomically(draft.folder / "count.json") as path:
        path.write_text(json.dumps(len(text.split())))
    return {"count": len(text.split())}


def never(draft: Draft) -> dict:
    raise AssertionError("built though it is there")


def test_what_is_made_is_found_again_and_not_made_twice(store: ArtifactStore):
    made = store.make(TEXT, write_text)
    again = store.make(TEXT, never)
    assert (made.cached, again.cached) == (False, True)
    assert again.manifest == made.manifest
    assert again.manifest.summary == {"words": 3}
    assert again.manifest.files["text.txt"]["bytes"] == 15


def test_a_changed_setting_remakes_the_stage_and_what_follows_and_nothing_else(store: ArtifactStore):
    other = Recipe("text", "b", 1, {"words": 5})
    for recipe, build in ((TEXT, write_text), (other, write_text), (COUNT, count_words)):
        store.make(recipe, build)
    longer = Recipe("text", "a", 1, {"words": 4})
    recount = Recipe("count", "a", 1, {}, (longer,))
    assert store.status(longer) == ("stale", "words: made with 3, now 4")
    assert store.status(recount) == ("stale", "text changes")
    assert store.status(other).state == "made"
    assert not store.make(longer, write_text).cached
    assert store.make(recount, count_words).manifest.summary == {"count": 4}
    assert store.make(other, never).cached


def test_a_new_stage_version_makes_stale_and_says_so(store: ArtifactStore):
    store.make(TEXT, write_text)
    assert store.status(Recipe("text", "a", 2, {"words": 3})) == ("stale", "code: made with version 1, now 2")


def test_the_fingerprint_tells_of_settings_parents_and_version_only(store: ArtifactStore):
    assert TEXT.fingerprint == Recipe("text", "a", 1, {"words": 3}).fingerprint
    others = [
        Recipe("text", "a", 2, {"words": 3}),
        Recipe("text", "a", 1, {"words": 2}),
        Recipe("t", "a", 1, {"words": 3}),
    ]
    assert len({TEXT.fingerprint, *(r.fingerprint for r in others)}) == 4
    assert COUNT.fingerprint != Recipe("count", "a", 1, {}, (others[1],)).fingerprint


def test_a_parent_made_otherwise_than_the_study_says_is_recorded_as_it_is(store: ArtifactStore):
    store.make(Recipe("text", "a", 1, {"words": 9}), write_text)
    made = store.make(COUNT, count_words)
    assert made.manifest.summary == {"count": 9}
    assert made.manifest.fingerprint != COUNT.fingerprint
    assert store.status(COUNT).state == "stale"


def test_a_missing_parent_is_named_with_the_cure(store: ArtifactStore):
    with pytest.raises(ArtifactError, match=r"text of a is not made yet: run .mind-atlas run"):
        store.make(COUNT, never)


def test_a_failing_build_leaves_the_old_version_and_its_own_files_for_the_next_try(store: ArtifactStore):
    old = store.make(TEXT, write_text)
    longer = Recipe("text", "a", 1, {"words": 4})

    def half(draft: Draft) -> dict:
        (draft.folder / "half.txt").write_text("half")
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        store.make(longer, half)
    assert store.get("text", "a").manifest == old.manifest
    assert (old.folder / "text.txt").exists()

    def rest(draft: Draft) -> dict:
        assert (draft.folder / "half.txt").read_text() == "half"
        return write_text(draft)

    made = store.make(longer, rest)
    assert store.get("text", "a").manifest == made.manifest
    assert not old.folder.exists()


def test_scratch_and_temporary_files_are_gone_when_the_artifact_is_complete(store: ArtifactStore):
    def build(draft: Draft) -> dict:
        (draft.folder / SCRATCH).mkdir()
        (draft.folder / SCRATCH / "checkpoint").write_text("x")
        (draft.folder / "shard.tmp").write_text("x")
        (draft.folder / ".tmpAbC").write_text("x")
        return write_text(draft)

    assert sorted(store.make(TEXT, build).manifest.files) == ["text.txt"]
    assert sorted(p.name for p in store.get("text", "a").folder.iterdir()) == ["text.txt"]


def test_making_again_replaces_the_artifact_though_it_is_there(store: ArtifactStore):
    first = store.make(TEXT, write_text)
    second = store.make(TEXT, write_text, again=True)
    third = store.make(TEXT, write_text, again=True)
    assert not second.cached
    assert first.manifest.files == second.manifest.files == third.manifest.files
    assert third.folder == first.folder != second.folder
    assert store.make(TEXT, never).cached


def test_a_reader_never_sees_a_half_made_artifact(store: ArtifactStore):
    """While versions replace one another, whoever asks finds a whole one."""
    store.make(TEXT, write_text)
    stop, wrong = threading.Event(), []

    def read() -> None:
        while not stop.is_set():
            manifest = store.manifest("text", "a")
            if manifest is None or manifest.settings["words"] != manifest.summary["words"]:
                wrong.append(manifest)

    reader = threading.Thread(target=read)
    reader.start()
    for words in range(4, 60):
        store.make(Recipe("text", "a", 1, {"words": words}), write_text)
    stop.set()
    reader.join()
    assert not wrong


def _make_slowly(root: Path, started: Path) -> None:
    def slow(draft: Draft) -> dict:
        with started.open("a") as file:
            file.write("x")
        time.sleep(0.5)
        return write_text(draft)

    ArtifactStore(root).make(TEXT, slow)


def test_of_two_makers_at_once_the_second_waits_and_uses_what_the_first_made(tmp_path: Path):
    context = mp.get_context("fork")
    makers = [context.Process(target=_make_slowly, args=(tmp_path / "r", tmp_path / "started")) for _ in range(2)]
    for maker in makers:
        maker.start()
    for maker in makers:
        maker.join(20)
    assert [m.exitcode for m in makers] == [0, 0]
    assert (tmp_path / "started").read_text() == "x"


def _hang(root: Path, ready: Path) -> None:
    def hang(draft: Draft) -> dict:
        ready.touch()
        time.sleep(60)
        return {}

    ArtifactStore(root).make(TEXT, hang)


def test_a_killed_maker_leaves_no_lock_and_no_artifact(tmp_path: Path):
    maker = mp.get_context("fork").Process(target=_hang, args=(tmp_path / "r", tmp_path / "ready"))
    maker.start()
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    os.kill(maker.pid, signal.SIGKILL)
    maker.join()
    store = ArtifactStore(tmp_path / "r")
    assert store.manifest("text", "a") is None
    assert not store.make(TEXT, write_text).cached


def test_an_interrupted_write_keeps_the_old_file(tmp_path: Path):
    path = tmp_path / "table"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), write_atomically(path) as temporary:
        temporary.write_text("ne")
        raise KeyboardInterrupt
    assert [p.name for p in tmp_path.iterdir()] == ["table"]
    assert path.read_text() == "old"


def test_a_full_disk_is_said_in_one_line_and_keeps_the_old_file(tmp_path: Path):
    path = tmp_path / "table"
    path.write_text("old")
    with pytest.raises(ArtifactError, match="No space left on device; nothing was replaced"), write_atomically(path):
        Path("/dev/full").write_text("x")
    assert path.read_text() == "old"


def test_too_little_space_is_refused_before_work_starts(tmp_path: Path):
    require_space(tmp_path, 1000)
    with pytest.raises(ArtifactError, match=r"needs 1000000.00 GB but its disk has .* GB free"):
        require_space(tmp_path, 10**15)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"stage": "text"}', "null"])
def test_a_damaged_manifest_is_named(store: ArtifactStore, text: str):
    store.make(TEXT, write_text)
    (store.root / "text" / "a" / "manifest.json").write_text(text)
    with pytest.raises(ArtifactError, match=r"manifest\.json is damaged"):
        store.get("text", "a")


@pytest.mark.parametrize("slug", ["", ".", "..", "../b", "a/b", ".hidden", "a\\b"])
def test_names_that_would_leave_the_store_are_refused(store: ArtifactStore, slug: str):
    with pytest.raises(ArtifactError, match="is no name"):
        store.manifest("text", slug)


def test_finished_artifacts_are_listed_by_stage(store: ArtifactStore):
    store.make(TEXT, write_text)
    store.make(Recipe("text", "b", 1, {"words": 1}), write_text)
    (store.root / "text" / "unfinished").mkdir()
    assert store.slugs("text") == ["a", "b"]
    assert store.slugs("nothing") == []


def test_a_store_that_cannot_be_written_is_said_in_one_line(tmp_path: Path):
    (tmp_path / "root").write_text("a file where a folder belongs")
    with pytest.raises(ArtifactError, match="cannot write to"):
        ArtifactStore(tmp_path / "root").make(TEXT, write_text)
    shutil.rmtree(tmp_path, ignore_errors=True)
