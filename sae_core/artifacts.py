"""Where everything made is kept, so that it is whole or absent, and never made twice.

`<root>/<stage>/<slug>/manifest.json` is the artifact. It names the folder beside it, called by fingerprint, that
holds the files:

    <root>/dictionary/<slug>/manifest.json            replaced atomically, last of all
    <root>/dictionary/<slug>/3f2a9c.../dictionary.safetensors

A new version is written into a folder of its own while readers go on using the old one; one `rename` of the manifest
switches over. A killed run leaves a folder that no manifest names: the next run with the same fingerprint goes on
from what it finds there.
"""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, NamedTuple

from filelock import FileLock, Timeout

from sae_core.errors import MindAtlasError
from sae_core.settings import fingerprint

SCHEMA = 1
MANIFEST = "manifest.json"
ATLAS, GENERATION = "atlas", "generation.json"
"""The stage that publishes what belongs together, and the file in its folder that says what does."""
DROPPED = "dropped.json"
"""What `generation.json` is called from the moment on that its generation is being deleted."""
SCRATCH = "scratch"
"""Sub-folder of a draft for what only a resumed run needs (checkpoints); gone when the artifact is complete."""

PROJECT = Path(__file__).resolve().parents[1]
"""The folder of this code: where the shipped studies and Dagster's settings lie."""

_PACKAGES = ("torch", "transformers", "tokenizers", "numpy", "faiss-cpu", "umap-learn", "openai", "xllamacpp")


def home() -> Path:
    """The folder of everything made: MIND_ATLAS_HOME, or `atlas` in the project's folder."""
    return Path(os.environ.get("MIND_ATLAS_HOME") or PROJECT / "atlas").expanduser().absolute()


class ArtifactError(MindAtlasError):
    """An artifact that is missing, damaged, or cannot be written."""


@dataclass(frozen=True)
class Recipe:
    """What an artifact is made from: its name, its settings, and the recipes of its parents."""

    stage: str
    slug: str
    version: int
    """Version of the stage's code; raised when the same settings give another result."""
    settings: dict[str, Any]
    parents: tuple["Recipe", ...] = ()

    @property
    def key(self) -> str:
        return f"{self.stage}/{self.slug}"

    @property
    def fingerprint(self) -> str:
        return self.fingerprint_from({parent.key: parent.fingerprint for parent in self.parents})

    def fingerprint_from(self, parents: dict[str, str]) -> str:
        """The fingerprint when the parents, by key, have the given ones."""
        return fingerprint([self.stage, self.version, self.settings, parents])


@dataclass(frozen=True)
class Manifest:
    """The record of a complete artifact."""

    stage: str
    slug: str
    fingerprint: str
    version: int
    settings: dict[str, Any]
    parents: dict[str, str]
    """Fingerprints of the artifacts this one was made from, by key."""
    summary: dict[str, Any]
    """What the stage says of its result: counts and metrics."""
    folder: str
    """Name of the folder beside the manifest that holds the files."""
    files: dict[str, dict[str, Any]]
    """Bytes and SHA-256 of each file, by its path inside that folder."""
    seconds: float
    made_at: str
    versions: dict[str, str] = field(default_factory=dict)
    commit: str = ""
    schema: int = SCHEMA

    @property
    def key(self) -> str:
        return f"{self.stage}/{self.slug}"


def fingerprint_of(folder: Path) -> str:
    """The fingerprint by which the folder of an artifact is called; another version of the same has a number too."""
    return folder.name.partition(".")[0]


def read_manifest(path: Path) -> Manifest | None:
    """The manifest in a file, or None when there is none. Raises ArtifactError when it cannot be read."""
    try:
        return Manifest(**json.loads(path.read_text("utf-8")))
    except FileNotFoundError:
        return None
    except (ValueError, TypeError) as error:
        raise ArtifactError(
            f"{path} is damaged ({error}): `mind-atlas verify --repair` removes it, and `run` goes on from there"
        ) from None


class Made(NamedTuple):
    """An artifact that is there now."""

    manifest: Manifest
    folder: Path
    cached: bool
    """True when it was there before, with the wanted fingerprint, and nothing was done."""


class Status(NamedTuple):
    """How an artifact stands to its recipe."""

    state: Literal["made", "stale", "missing", "damaged", "refused"]
    why: str


@dataclass
class Draft:
    """An artifact being made."""

    recipe: Recipe
    folder: Path
    """Write here. A killed run's files are still here for the next run with the same fingerprint."""
    parents: dict[str, Made]
    """The finished parents, by stage; a second one of a stage by its key."""

    @property
    def fingerprint(self) -> str:
        """What the artifact will have: that of the recipe, from the parents as they are."""
        return fingerprint_of(self.folder)


def second(parents: dict[str, Made], stage: str) -> Path | None:
    """Of a draft's parents, the folder of the second one of a stage, if it has two."""
    return next((made.folder for name, made in parents.items() if name.startswith(f"{stage}/")), None)


class ArtifactStore:
    """All artifacts under one root folder."""

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().absolute()

    def manifest(self, stage: str, slug: str) -> Manifest | None:
        """The manifest, or None when the artifact was never made. Raises ArtifactError when it cannot be read."""
        return read_manifest(self._home(stage, slug) / MANIFEST)

    def get(self, stage: str, slug: str) -> Made:
        """The finished artifact. Raises ArtifactError when it was never made."""
        manifest = self.manifest(stage, slug)
        if manifest is None:
            raise ArtifactError(
                f"{stage} of {slug} is not made yet: run `mind-atlas run`, or materialize it in Dagster"
            )
        return Made(manifest, self._home(stage, slug) / manifest.folder, cached=True)

    def slugs(self, stage: str) -> list[str]:
        """Slugs of the finished artifacts of a stage, sorted."""
        return sorted(path.parent.name for path in (self.root / stage).glob(f"*/{MANIFEST}"))

    def status(self, recipe: Recipe) -> Status:
        """Whether the artifact is as the recipe and all its parents' recipes want it, and if not, why."""
        manifest = self.manifest(recipe.stage, recipe.slug)
        if manifest is None:
            return Status("missing", "never made")
        if manifest.fingerprint == recipe.fingerprint:
            damage = self.damage(manifest)
            return Status("damaged", "; ".join(damage.values())) if damage else Status("made", "")
        return Status("stale", "; ".join(_differences(manifest, recipe)))

    def damage(self, manifest: Manifest, *, full: bool = False) -> dict[str, str]:
        """Files of a finished artifact that are not as they were made, by name, and what is wrong with each.

        The sizes are always looked at, which takes no time; `full` reads every byte too, and compares the SHA-256.
        """
        folder, found = self._home(manifest.stage, manifest.slug) / manifest.folder, {}
        for name, wanted in manifest.files.items():
            try:
                size = (folder / name).stat().st_size
                if size != wanted["bytes"]:
                    found[name] = f"{name} has {size} bytes and not {wanted['bytes']}"
                elif full and file_sha256(folder / name) != wanted["sha256"]:
                    found[name] = f"{name} has other content than was written"
            except FileNotFoundError:
                found[name] = f"{name} is missing"
            except OSError as error:
                found[name] = f"{name} cannot be read ({error.strerror})"
        return found

    def remove(self, manifest: Manifest, files: Iterable[str]) -> None:
        """Remove damaged files of a finished artifact: the next `make` makes them again, and what lies whole stays."""
        with self.lock(manifest.stage, manifest.slug):
            for name in files:
                (self._home(manifest.stage, manifest.slug) / manifest.folder / name).unlink(missing_ok=True)

    def forget(self, stage: str, slug: str) -> None:
        """Remove a manifest that cannot be read: the next `make` finds what was kept, or makes the artifact again."""
        with self.lock(stage, slug):
            (self._home(stage, slug) / MANIFEST).unlink(missing_ok=True)

    def make(self, recipe: Recipe, build: Callable[[Draft], dict[str, Any]], *, again: bool = False) -> Made:
        """Return the artifact, made by `build` unless it is there with the right fingerprint.

        `build` writes into `draft.folder` and returns the summary (JSON values). A second call for the same artifact,
        in this or another process, waits until the first is done and then finds its result. What exists stays
        readable until the new version is complete. An artifact that has lost files, or parts of them, is mended where
        it lies: the broken files are removed, and `build` goes on from the rest. One that a generation of an
        atlas kept (see `generations`) is taken from there: nothing is written where somebody may be reading.

        Args:
            recipe: what is wanted. Parents are taken as they are on disk; their actual fingerprints are recorded.
            build: makes the files; may go on from what a killed run left in `draft.folder`.
            again: make it even when it is there.

        Raises:
            ArtifactError: a parent is missing or damaged, the disk is full, or the result cannot be written.
        """
        with self.lock(recipe.stage, recipe.slug):
            parents, actual, wanted = self._wanted(recipe)
            found = None if again else self._found(recipe, wanted)
            damage = self.damage(found) if found else {}
            if found and not damage:
                return self._switch(found)
            folder = self._place(recipe, wanted, found)
            for broken in damage:
                (folder / broken).unlink(missing_ok=True)
            folder.mkdir(parents=True, exist_ok=True)
            start = time.monotonic()
            summary = build(Draft(recipe, folder, parents))
            manifest = Manifest(
                recipe.stage, recipe.slug, wanted, recipe.version, recipe.settings, actual, summary,
                folder.name, files={}, seconds=round(time.monotonic() - start, 2),
                made_at=datetime.now(UTC).isoformat("T", "seconds"), versions=_versions(), commit=_commit(),
            )  # fmt: skip
            return self._commit(manifest, folder)

    def draft_folder(self, recipe: Recipe) -> Path | None:
        """Where `make` would write the artifact from its parents as they are; None when it is made already.

        Raises ArtifactError when a parent is missing.
        """
        wanted = self._wanted(recipe)[2]
        return None if self._found(recipe, wanted) else self._place(recipe, wanted, None)

    def _found(self, recipe: Recipe, wanted: str) -> Manifest | None:
        """The manifest of what has the wanted fingerprint: the newest, or one that a generation kept."""
        now, home = self.manifest(recipe.stage, recipe.slug), self._home(recipe.stage, recipe.slug)
        if now and now.fingerprint == wanted:
            return now
        kept = (Manifest(**said[recipe.key]) for said in self.generations().values() if recipe.key in said)
        copies = (read_manifest(path) for path in sorted(home.glob(f"{wanted}*/{MANIFEST}")))  # an atlas has them
        same = [manifest for manifest in (*kept, *copies) if manifest and manifest.fingerprint == wanted]
        return next((manifest for manifest in reversed(same) if (home / manifest.folder).is_dir()), None)

    def _place(self, recipe: Recipe, wanted: str, found: Manifest | None) -> Path:
        """Where to write: what is damaged where it lies, all else in the first folder that nobody needs."""
        home, now = self._home(recipe.stage, recipe.slug), self.manifest(recipe.stage, recipe.slug)
        if found:
            return home / found.folder
        needed = self._needed(recipe.stage, recipe.slug) | ({now.folder} if now else set())
        names = (wanted, *(f"{wanted}.{n}" for n in range(2, len(needed) + 3)))
        return home / next(name for name in names if name not in needed)

    def _switch(self, manifest: Manifest) -> Made:
        """Make a finished artifact the newest, unless it is."""
        home = self._home(manifest.stage, manifest.slug)
        if self.manifest(manifest.stage, manifest.slug) != manifest:
            with write_atomically(home / MANIFEST) as path:
                path.write_text(json.dumps(asdict(manifest), indent=1), "utf-8")
        return Made(manifest, home / manifest.folder, cached=True)

    def _wanted(self, recipe: Recipe) -> tuple[dict[str, Made], dict[str, str], str]:
        """The parents as they are, as in `Draft`; their fingerprints; and the artifact's that follows."""
        parents: dict[str, Made] = {}
        for parent in recipe.parents:
            name = parent.key if parent.stage in parents else parent.stage
            parents[name] = self.get(parent.stage, parent.slug)
        for made in parents.values():
            if damage := self.damage(made.manifest):
                raise ArtifactError(f"{made.folder}: {'; '.join(damage.values())}: `mind-atlas run` makes it again")
        actual = {made.manifest.key: made.manifest.fingerprint for made in parents.values()}
        return parents, actual, recipe.fingerprint_from(actual)

    def _commit(self, manifest: Manifest, folder: Path) -> Made:
        """Checksum, switch the manifest over, and drop what it replaced."""
        for leftover in {*folder.rglob("*.tmp"), *folder.rglob(".*")}:  # a killed run's: ours, and safetensors'
            leftover.unlink()
        passing = {folder / SCRATCH, folder / MANIFEST}  # the latter an atlas's copy, written below
        kept = (path for path in sorted(folder.rglob("*")) if path.is_file() and not passing & {path, *path.parents})
        files = {str(path.relative_to(folder)): _describe(path) for path in kept}
        manifest = replace(manifest, files=files)
        copy = [folder] if manifest.stage == ATLAS else []  # for whoever goes back to this generation
        for home in (*copy, folder.parent):
            with write_atomically(home / MANIFEST) as path:
                path.write_text(json.dumps(asdict(manifest), indent=1), "utf-8")
        for other in (folder / SCRATCH, *self.unused(manifest)):
            shutil.rmtree(other, ignore_errors=True)
        return Made(manifest, folder, cached=False)

    def unused(self, manifest: Manifest) -> list[Path]:
        """Folders beside an artifact's that neither it needs, nor a generation of an atlas (see `generations`).

        There are none while a generation cannot be read: it may need anything.
        """
        home, needed = self._home(manifest.stage, manifest.slug), self._needed(manifest.stage, manifest.slug)
        if not all(self.generations().values()):
            return []
        folders = (path for path in sorted(home.iterdir()) if path.is_dir())
        return [path for path in folders if path.name not in {*needed, manifest.folder}]

    def _needed(self, stage: str, slug: str) -> set[str]:
        """Names of the folders of an artifact's versions that generations are made of, or of generations."""
        generations, key = self.generations(), f"{stage}/{slug}"
        needed = {path.name for path in generations if path.parent == self._home(stage, slug)}
        if stage == "activations":  # which nobody reads afterwards, and which are large
            return needed
        return needed | {said[key]["folder"] for said in generations.values() if key in said}

    def generations(self) -> dict[Path, dict[str, Any]]:
        """What the generations that are kept are made of, by their folders; nothing of one that cannot be read."""
        found: dict[Path, dict[str, Any]] = {}
        for path in sorted(self.root.glob(f"{ATLAS}/*/*/{MANIFEST}")):
            try:
                found[path.parent] = json.loads((path.parent / GENERATION).read_text("utf-8"))["manifests"]
            except (OSError, ValueError, TypeError, KeyError):
                if not (path.parent / DROPPED).exists():
                    found[path.parent] = {}
        return found

    def _home(self, stage: str, slug: str) -> Path:
        if not slug or "/" in slug or "\\" in slug or slug.startswith("."):
            raise ArtifactError(f"{slug!r} is no name of an artifact: names hold no slash and begin with no dot")
        return self.root / stage / slug

    @contextmanager
    def lock(self, stage: str = "", slug: str = "", *, wait: bool = True) -> Iterator[None]:
        """One maker at a time, of an artifact or, without a name, of anything: whoever comes later waits.

        The system frees the lock when its owner dies, however it does; a slot of a Dagster pool outlives it.

        Raises:
            ArtifactError: nothing can be written here; or somebody has the lock, and nobody wants to `wait`.
        """
        path = self._home(stage, slug) / ".lock" if stage else self.root / ".machine.lock"
        lock = FileLock(path)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire(timeout=-1 if wait else 0)
        except Timeout:
            raise ArtifactError(f"{path.parent} is being written by a run: try again when it has ended") from None
        except OSError as error:
            why = error.strerror or error
            raise ArtifactError(f"cannot write to {path.parent}: {why}; set MIND_ATLAS_HOME elsewhere") from None
        try:
            yield
        finally:
            lock.release()


@contextmanager
def write_atomically(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success fsync it and rename it into place, else remove it.

    Raises:
        ArtifactError: the disk is full or not writable; `path` is as it was before.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        yield temporary
        with temporary.open("rb+") as file:
            os.fchmod(file.fileno(), 0o644)  # safetensors makes files that only their owner may read
            os.fsync(file.fileno())
        temporary.replace(path)
        _fsync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise ArtifactError(f"cannot write {path}: {error.strerror or error}; nothing was replaced") from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def new_folder(folder: Path) -> None:
    """Make a folder to export into. Raises ArtifactError when it holds something already, or cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        taken = next(folder.iterdir(), None)
    except OSError as error:
        raise ArtifactError(f"cannot write to {folder}: {error.strerror}; name another folder") from None
    if taken:
        raise ArtifactError(f"{folder} holds {taken.name} already: name a new or an empty folder")


def require_space(folder: Path, needed: int) -> None:
    """Raise ArtifactError unless the disk under `folder` has `needed` bytes free, before long work starts."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ArtifactError(
            f"{folder} needs {needed / 1e9:.2f} GB but its disk has {free / 1e9:.2f} GB free: "
            "free some, set MIND_ATLAS_HOME (or MIND_ATLAS_CACHE) elsewhere, or ask for fewer tokens"
        )


def file_sha256(path: Path) -> str:
    """SHA-256 of a file as hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _describe(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": file_sha256(path)}


def _fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _differences(manifest: Manifest, recipe: Recipe) -> Iterator[str]:
    """In words, what the recipe wants otherwise than the manifest has it."""
    if manifest.version != recipe.version:
        yield f"code: made with version {manifest.version}, now {recipe.version}"
    for key in sorted(manifest.settings.keys() | recipe.settings.keys()):
        old, new = manifest.settings.get(key), recipe.settings.get(key)
        if old != new:
            yield f"{key}: made with {_short(old)}, now {_short(new)}"
    for parent in recipe.parents:
        if manifest.parents.get(parent.key) != parent.fingerprint:
            yield f"{parent.stage} changes"


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:40]}... ({fingerprint(value)})"


@cache
def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


@cache
def _commit() -> str:
    """The git commit of this code, or nothing when it does not lie in a checkout."""
    try:
        command = ["git", "-C", str(PROJECT), "rev-parse", "HEAD"]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
