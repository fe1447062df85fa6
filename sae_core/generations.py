"""Generations of an atlas: which finished artifacts belong together, and which generation is served.

Stages are made again one after another, so for a while the newest of each do not go together. What a reader sees is
therefore a generation: the artifacts of all stages, as they were when the last of them was done and none was worse than
before (`promotion`). It is an artifact of its own, `<root>/atlas/<dictionary>/`, whose manifest names the generation
that is served; the files of the last few generations are kept, so that `roll_back` is one rename.
"""

import fcntl
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from sae_core.artifacts import (
    ATLAS,
    GENERATION,
    MANIFEST,
    ArtifactError,
    ArtifactStore,
    Manifest,
    write_atomically,
)
from sae_core.study import RetrainingSettings

REFUSED = "refused.json"
READERS = ".readers"
"""File in a generation's folder on which every process that reads the generation holds a shared lock."""


class Generation(NamedTuple):
    """One whole atlas of a dictionary."""

    number: int
    """Counted from 1."""
    folder: Path
    manifests: dict[str, Manifest]
    """Of every stage, by key (`features/<dictionary>`)."""


class Snapshot(ArtifactStore):
    """A store as it was: the artifacts of one generation, and nothing else."""

    def __init__(self, root: Path, generation: Generation) -> None:
        super().__init__(root)
        self.generation = generation
        self._reading = (generation.folder / READERS).open("a")
        fcntl.flock(self._reading, fcntl.LOCK_SH)  # the system frees it when this process ends, however it does

    def manifest(self, stage: str, slug: str) -> Manifest | None:
        """The manifest of the generation's artifact, or None when it has no such one.

        One that was made again since from the very same things (as labels are, when more of them are written) counts.
        """
        kept = self.generation.manifests.get(f"{stage}/{slug}")
        now = super().manifest(stage, slug) if kept else None
        return now if kept and now and now.fingerprint == kept.fingerprint else kept

    def slugs(self, stage: str) -> list[str]:
        """Slugs of the generation's artifacts of a stage."""
        return sorted(m.slug for m in self.generation.manifests.values() if m.stage == stage)


def served(store: ArtifactStore, dictionary: str) -> ArtifactStore:
    """The store as readers of a dictionary's atlas see it: its served generation; before the first, what there is."""
    manifest = None if isinstance(store, Snapshot) else store.manifest(ATLAS, dictionary)
    return Snapshot(store.root, _read(store.get(ATLAS, dictionary).folder)) if manifest else store


def generations(store: ArtifactStore, dictionary: str) -> list[Generation]:
    """All generations that are kept, oldest first."""
    found = (_read(path.parent) for path in (store.root / ATLAS / dictionary).glob(f"*/{GENERATION}"))
    return sorted(found, key=lambda generation: generation.number)


def write_generation(store: ArtifactStore, dictionary: str, corpus: str, site: str, folder: Path) -> Generation:
    """Write down the artifacts of all stages as they are now, as the next generation; it is not served yet."""
    slugs = {"corpus": corpus, "activations": site}
    stages = (path.name for path in sorted(store.root.iterdir()) if path.is_dir() and path.name != ATLAS)
    found = (store.manifest(stage, slugs.get(stage, dictionary)) for stage in stages)
    manifests = {manifest.key: manifest for manifest in found if manifest}
    number = max((generation.number for generation in generations(store, dictionary)), default=0) + 1
    said = {"number": number, "manifests": {key: asdict(manifest) for key, manifest in manifests.items()}}
    with write_atomically(folder / GENERATION) as path:
        path.write_text(json.dumps(said, indent=1), "utf-8")
    return Generation(number, folder, manifests)


def roll_back(store: ArtifactStore, dictionary: str) -> Generation:
    """Serve the generation before the one that is served, and promote the latter no more.

    Raises:
        ArtifactError: none is served, or none is kept from before.
    """
    now = store.get(ATLAS, dictionary)
    number = _read(now.folder).number
    earlier = [generation for generation in generations(store, dictionary) if generation.number < number]
    if not earlier:
        raise ArtifactError(
            f"no generation before number {number} of {dictionary} is kept: there is nothing to go back to"
        )
    refuse(store, dictionary, now.manifest.fingerprint, "rolled back by hand")
    with write_atomically(store.root / ATLAS / dictionary / MANIFEST) as path:
        shutil.copyfile(earlier[-1].folder / MANIFEST, path)
    return earlier[-1]


def outdated(store: ArtifactStore, keep: int) -> list[Path]:
    """Folders that nobody needs: generations before the last `keep`, and what is in no generation and not the newest.

    What is served, what a process reads, and what a running stage writes is needed.
    """
    old = [generation.folder for slug in store.slugs(ATLAS) for generation in _old(store, slug, keep)]
    found = list(old)
    for stage in (path.name for path in sorted(store.root.iterdir()) if path.is_dir()):
        for slug in store.slugs(stage):
            if not store.is_being_made(stage, slug):
                found += store.unused(store.get(stage, slug).manifest, old)
    return sorted(set(found))


def _old(store: ArtifactStore, dictionary: str, keep: int) -> list[Generation]:
    """Generations that are neither among the last `keep`, nor served, nor read by anyone."""
    serving = store.get(ATLAS, dictionary).folder
    candidates = generations(store, dictionary)[:-keep]
    return [g for g in candidates if g.folder != serving and not _is_read(g)]


def _is_read(generation: Generation) -> bool:
    try:
        with (generation.folder / READERS).open("a") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def refuse(store: ArtifactStore, dictionary: str, fingerprint: str, why: str) -> None:
    """Remember that what has this fingerprint is not to be served."""
    path = store.root / ATLAS / dictionary / REFUSED
    path.parent.mkdir(parents=True, exist_ok=True)
    with write_atomically(path) as temporary:
        temporary.write_text(json.dumps(refused(store, dictionary) | {fingerprint: why}, indent=1), "utf-8")


def refused(store: ArtifactStore, dictionary: str) -> dict[str, str]:
    """Fingerprints of what is not to be served, and why."""
    path = store.root / ATLAS / dictionary / REFUSED
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


def refusal(fingerprint: str, settings: RetrainingSettings) -> str:
    """What a refusal is remembered by: it holds until what is refused, or the bounds, change."""
    return f"{fingerprint} {settings.fingerprint()}"


def why_refused(store: ArtifactStore, dictionary: str, fingerprint: str, settings: RetrainingSettings) -> str:
    """Why the atlas of a fingerprint was refused; empty when it was not."""
    known = refused(store, dictionary)
    return known.get(refusal(fingerprint, settings), known.get(fingerprint, ""))


def _read(folder: Path) -> Generation:
    try:
        said: dict[str, Any] = json.loads((folder / GENERATION).read_text("utf-8"))
        return Generation(said["number"], folder, {key: Manifest(**value) for key, value in said["manifests"].items()})
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise ArtifactError(f"{folder / GENERATION} is damaged ({error}): run the study again") from None
