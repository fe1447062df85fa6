"""Generations of an atlas: which finished artifacts belong together, and which generation is served.

Stages are made again one after another, so for a while the newest of each do not go together. What a reader sees is
therefore a generation: the artifacts of all stages, as they were when the last of them was done and none was worse than
before (`promotion`). It is an artifact of its own, `<root>/atlas/<dictionary>/`, whose manifest names the generation
that is served; the files of the last few generations are kept, so that `roll_back` is one rename.
"""

import fcntl
import json
import os
import shutil
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from sae_core.artifacts import (
    ATLAS,
    DROPPED,
    GENERATION,
    MANIFEST,
    ArtifactError,
    ArtifactStore,
    Made,
    Manifest,
    fingerprint_of,
    write_atomically,
)
from sae_core.study import RetrainingSettings

REFUSED = "refused.json"


class Generation(NamedTuple):
    """One whole atlas of a dictionary."""

    number: int
    """Counted from 1."""
    follows: int
    """Number of the one that was served when this one was made; 0 for none."""
    folder: Path
    manifests: dict[str, Manifest]
    """Of every stage, by key (`features/<dictionary>`)."""

    @property
    def fingerprint(self) -> str:
        """Of the atlas; the folder is called by it."""
        return fingerprint_of(self.folder)

    def holds(self, fingerprint: str) -> bool:
        """Whether it is, or one of its artifacts is, what has this fingerprint."""
        return fingerprint in {self.fingerprint, *(manifest.fingerprint for manifest in self.manifests.values())}


class Snapshot(ArtifactStore):
    """A store as it was: the artifacts of one generation, and nothing else. Nothing of it is deleted while it is open.

    Raises:
        FileNotFoundError: the generation was deleted just now.
    """

    def __init__(self, root: Path, generation: Generation) -> None:
        super().__init__(root)
        self.generation = generation
        reading = os.open(generation.folder, os.O_RDONLY)  # a folder can be locked where nothing can be written
        weakref.finalize(self, os.close, reading)
        fcntl.flock(reading, fcntl.LOCK_SH)  # the system frees it when this process ends, however it does
        if not (generation.folder / GENERATION).exists():
            raise FileNotFoundError(generation.folder / GENERATION)

    def manifest(self, stage: str, slug: str) -> Manifest | None:
        """The manifest of the generation's artifact, or None when it has no such one.

        Two things that were made since count: labels, to which more were added, and what comes after the atlas
        (`steering_report`), if it was made from this generation.
        """
        of = self.generation.manifests
        kept = of.get(f"{stage}/{slug}")
        if kept and stage != "labels":
            return kept
        now = super().manifest(stage, slug)
        if kept:
            return now if now and now.fingerprint == kept.fingerprint else kept
        return now if now and all(self._holds(key, p) for key, p in now.parents.items()) else None

    def _holds(self, key: str, fingerprint: str) -> bool:
        """Whether an artifact is the generation's, or was made from it."""
        manifest = self.manifest(*key.split("/", 1))
        return manifest is not None and manifest.fingerprint == fingerprint

    def slugs(self, stage: str) -> list[str]:
        """Slugs of the generation's artifacts of a stage."""
        return sorted(m.slug for m in self.generation.manifests.values() if m.stage == stage)


def served(store: ArtifactStore, dictionary: str) -> ArtifactStore:
    """The store as readers of a dictionary's atlas see it: its served generation; before the first, what there is."""
    while not isinstance(store, Snapshot) and (generation := serving(store, dictionary)):
        try:
            return Snapshot(store.root, generation)
        except FileNotFoundError:
            continue  # another one has been promoted, and this one deleted
    return store


def serving(store: ArtifactStore, dictionary: str) -> Generation | None:
    """The generation that is served; if that is damaged, the last one that is not and was not rolled back."""
    try:
        manifest = store.manifest(ATLAS, dictionary)
    except ArtifactError:
        manifest = None
    known = _wanted(store, dictionary)[::-1]
    named = [generation for generation in known if manifest and generation.folder.name == manifest.folder]
    return next((generation for generation in [*named, *known] if not _damage(store, generation)), None)


def followed(store: ArtifactStore, dictionary: str, fingerprint: str) -> Generation | None:
    """The generation that what has this fingerprint follows: the served one.

    What is itself part of the served one, and is being mended, follows what that one followed.
    """
    known = {generation.number: generation for generation in generations(store, dictionary)}
    now = serving(store, dictionary)
    while now and now.holds(fingerprint):
        now = known.get(now.follows)
    return now


def generations(store: ArtifactStore, dictionary: str) -> list[Generation]:
    """All generations that are kept and can be read, oldest first."""
    found = (_read(path.parent) for path in (store.root / ATLAS / dictionary).glob(f"*/{MANIFEST}"))
    return sorted((generation for generation in found if generation), key=lambda generation: generation.number)


def write_generation(store: ArtifactStore, dictionary: str, parts: dict[str, Made], folder: Path) -> Generation:
    """Write down what was made, by stage, as the next generation; it is not served yet."""
    manifests = {made.manifest.key: made.manifest for made in parts.values()}
    others = [g.number for g in generations(store, dictionary) if g.folder != folder]
    before = followed(store, dictionary, fingerprint_of(folder))
    generation = Generation(max(others, default=0) + 1, before.number if before else 0, folder, manifests)
    said = generation._asdict() | {"manifests": {key: asdict(manifest) for key, manifest in manifests.items()}}
    del said["folder"]  # where this lies
    with write_atomically(folder / GENERATION) as path:
        path.write_text(json.dumps(said, indent=1), "utf-8")
    return generation


def roll_back(store: ArtifactStore, dictionary: str) -> Generation:
    """Serve the generation before the one that is served, and promote the latter no more.

    Raises:
        ArtifactError: none is served, or none is kept from before that is sound.
    """
    with store.lock(ATLAS, dictionary):  # not between the comparison of a challenger and its promotion
        now = serving(store, dictionary) or _none_served(dictionary)
        earlier = [g for g in _wanted(store, dictionary) if g.number < now.number and not _damage(store, g)]
        if not earlier:
            raise ArtifactError(
                f"no sound generation before {now.number} of {dictionary} is kept: there is nothing to go back to"
            )
        refuse(store, dictionary, now.fingerprint, "rolled back by hand")
        with write_atomically(store.root / ATLAS / dictionary / MANIFEST) as path:
            shutil.copyfile(earlier[-1].folder / MANIFEST, path)
        return earlier[-1]


def outdated(store: ArtifactStore, keep: int) -> list[Path]:
    """Folders that nobody needs: generations before the last `keep`, and what only they are made of.

    What is served or newest, what a process reads, and what a killed run can go on from is needed.
    """
    old = [generation for slug in _dictionaries(store) for generation in _old(store, slug, keep)]
    return list(dict.fromkeys(path for generation in old for path in _only(store, generation, old)))


def collect(store: ArtifactStore, keep: int) -> list[Path]:
    """Delete what is `outdated`, one generation after another, and return it. The caller holds the store's lock.

    A generation is made unreadable first, while nobody can begin to read it; one that a killed process left half
    deleted is gone on with.
    """
    gone = []
    for slug in _dictionaries(store):
        for generation in _old(store, slug, keep):
            if _drop(generation):
                folders = _only(store, generation, [generation])
                for folder in folders:
                    shutil.rmtree(folder, ignore_errors=True)
                gone += folders
    return gone


def _only(store: ArtifactStore, generation: Generation, without: list[Generation]) -> list[Path]:
    """Folders that only this generation needs, or another one of those without which it goes; its own comes last."""
    gone = {g.folder for g in without}
    others = [g for slug in _dictionaries(store) for g in generations(store, slug) if g.folder not in gone]
    needed = {folder for other in others for folder in _folders(store, other)}
    found = []
    for manifest, folder in zip(generation.manifests.values(), _folders(store, generation), strict=True):
        with suppress(ArtifactError):  # a newest manifest that is damaged: nobody can say what it needs
            if folder not in {*needed, store.get(manifest.stage, manifest.slug).folder} and folder.is_dir():
                found.append(folder)
    return [*found, generation.folder]


def _folders(store: ArtifactStore, generation: Generation) -> list[Path]:
    return [store.root / m.stage / m.slug / m.folder for m in generation.manifests.values()]


def _dictionaries(store: ArtifactStore) -> list[str]:
    """Those that have generations."""
    return sorted({path.parents[1].name for path in (store.root / ATLAS).glob(f"*/*/{MANIFEST}")})


def _old(store: ArtifactStore, dictionary: str, keep: int) -> list[Generation]:
    """Generations that are neither among the last `keep`, nor served, nor read by anyone; half deleted ones too."""
    now = serving(store, dictionary)
    if not all(store.generations().values()):  # one cannot be read: it may need anything
        return []
    candidates = [g for g in generations(store, dictionary)[:-keep] if now and g.folder != now.folder]
    folders = (path.parent for path in (store.root / ATLAS / dictionary).glob(f"*/{DROPPED}"))
    dropped = (_read(folder, DROPPED) for folder in folders)
    return [*(g for g in dropped if g), *(g for g in candidates if not _is_read(g))]


def _is_read(generation: Generation) -> bool:
    return not _shut(generation, lambda: None)


def _drop(generation: Generation) -> bool:
    """Make a generation unreadable; False when somebody reads it."""

    def rename() -> None:
        if (generation.folder / GENERATION).exists():
            (generation.folder / GENERATION).rename(generation.folder / DROPPED)
        (generation.folder / MANIFEST).unlink(missing_ok=True)

    return _shut(generation, rename)


def _shut(generation: Generation, act: Callable[[], None]) -> bool:
    """Do something while nobody can begin to read a generation; False, and nothing done, when somebody reads it."""
    handle = os.open(generation.folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        act()
    except OSError:  # read, or on a file system that has no such locks
        return False
    finally:
        os.close(handle)
    return True


def _wanted(store: ArtifactStore, dictionary: str) -> list[Generation]:
    """The generations that were not rolled back."""
    no = refused(store, dictionary)
    return [generation for generation in generations(store, dictionary) if generation.fingerprint not in no]


def _damage(store: ArtifactStore, generation: Generation) -> bool:
    """Whether something is missing of what readers need."""
    return any(store.damage(m) for m in generation.manifests.values() if m.stage != "activations")


def _none_served(dictionary: str) -> Generation:
    raise ArtifactError(f"no atlas of {dictionary} is served yet: there is nothing to go back from")


def refuse(store: ArtifactStore, dictionary: str, fingerprint: str, why: str) -> None:
    """Remember that what has this fingerprint is not to be served. The caller holds the lock of the atlas."""
    path = store.root / ATLAS / dictionary / REFUSED
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path) as temporary:
        temporary.write_text(json.dumps(refused(store, dictionary) | {fingerprint: why}, indent=1), "utf-8")


def refused(store: ArtifactStore, dictionary: str) -> dict[str, str]:
    """Fingerprints of what is not to be served, and why."""
    path = store.root / ATLAS / dictionary / REFUSED
    try:
        said: dict[str, str] = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ArtifactError(f"{path} is damaged ({error}): delete it, and what was refused is compared again") from None
    return said


def refusal(fingerprint: str, settings: RetrainingSettings) -> str:
    """What a refusal is remembered by: it holds until what is refused, or the bounds, change."""
    return f"{fingerprint} {settings.fingerprint()}"


def why_refused(store: ArtifactStore, dictionary: str, fingerprint: str, settings: RetrainingSettings) -> str:
    """Why the atlas of a fingerprint was refused; empty when it was not."""
    known = refused(store, dictionary)
    return known.get(refusal(fingerprint, settings), known.get(fingerprint, ""))


def _read(folder: Path, name: str = GENERATION) -> Generation | None:
    """The generation in a folder; None when there is none, or it is damaged: the stage `atlas` is, and is mended."""
    try:
        said: dict[str, Any] = json.loads((folder / name).read_text("utf-8"))
        parts = {key: Manifest(**value) for key, value in said["manifests"].items()}
        return Generation(said["number"], said.get("follows", said["number"] - 1), folder, parts)
    except (OSError, ValueError, TypeError, KeyError):
        return None
