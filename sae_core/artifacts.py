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


def second(parents: dict[str, Made], stage: str) -> Path | None:
    """Of a draft's parents, the folder of the second one of a stage, if it has two."""
    return next((made.folder for name, made in parents.items() if name.startswith(f"{stage}/")), None)


class ArtifactStore:
    """All artifacts under one root folder."""

    def __init__(self, root: Path) -> None:
        self.root = root.expanduser().absolute()

    def manifest(self, stage: str, slug: str) -> Manifest | None:
        """The manifest, or None when the artifact was never made. Raises ArtifactError when it cannot be read."""
        path = self._home(stage, slug) / MANIFEST
        try:
            return Manifest(**json.loads(path.read_text("utf-8")))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError) as error:
            raise ArtifactError(f"{path} is damaged ({error}): delete it, and run the study again") from None

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
        with self._lock(manifest.stage, manifest.slug):
            for name in files:
                (self._home(manifest.stage, manifest.slug) / manifest.folder / name).unlink(missing_ok=True)

    def make(self, recipe: Recipe, build: Callable[[Draft], dict[str, Any]], *, again: bool = False) -> Made:
        """Return the artifact, made by `build` unless it is there with the right fingerprint.

        `build` writes into `draft.folder` and returns the summary (JSON values). A second call for the same artifact,
        in this or another process, waits until the first is done and then finds its result. What exists stays
        readable until the new version is complete. An artifact that has lost files, or parts of them, is mended where
        it lies: the broken files are removed, and `build` goes on from the rest.

        Args:
            recipe: what is wanted. Parents are taken as they are on disk; their actual fingerprints are recorded.
            build: makes the files; may go on from what a killed run left in `draft.folder`.
            again: make it even when it is there.

        Raises:
            ArtifactError: a parent is missing or damaged, the disk is full, or the result cannot be written.
        """
        with self._lock(recipe.stage, recipe.slug):
            parents, actual, wanted = self._wanted(recipe)
            found = self.manifest(recipe.stage, recipe.slug)
            if found and found.fingerprint == wanted and not again:
                damage = self.damage(found)
                if not damage:
                    return self.get(recipe.stage, recipe.slug)
                name = found.folder
                for broken in damage:
                    (self._home(recipe.stage, recipe.slug) / name / broken).unlink(missing_ok=True)
            else:
                name = wanted if not found or found.folder != wanted else f"{wanted}.again"
            folder = self._home(recipe.stage, recipe.slug) / name
            folder.mkdir(parents=True, exist_ok=True)
            start = time.monotonic()
            summary = build(Draft(recipe, folder, parents))
            manifest = Manifest(
                recipe.stage, recipe.slug, wanted, recipe.version, recipe.settings, actual, summary,
                name, files={}, seconds=round(time.monotonic() - start, 2),
                made_at=datetime.now(UTC).isoformat("T", "seconds"), versions=_versions(), commit=_commit(),
            )  # fmt: skip
            return self._commit(manifest, folder)

    def draft_folder(self, recipe: Recipe) -> Path | None:
        """Where `make` would write the artifact from its parents as they are; None when it is made already.

        Raises ArtifactError when a parent is missing.
        """
        found, wanted = self.manifest(recipe.stage, recipe.slug), self._wanted(recipe)[2]
        return None if found and found.fingerprint == wanted else self._home(recipe.stage, recipe.slug) / wanted

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
        kept = (path for path in sorted(folder.rglob("*")) if path.is_file() and folder / SCRATCH not in path.parents)
        files = {str(path.relative_to(folder)): _describe(path) for path in kept}
        manifest = replace(manifest, files=files)
        copy = [folder] if manifest.stage == ATLAS else []  # for whoever goes back to this generation
        for home in (*copy, folder.parent):
            with write_atomically(home / MANIFEST) as path:
                path.write_text(json.dumps(asdict(manifest), indent=1), "utf-8")
        for other in (folder / SCRATCH, *self.unused(manifest)):
            shutil.rmtree(other, ignore_errors=True)
        return Made(manifest, folder, cached=False)

    def unused(self, manifest: Manifest, without: Iterable[Path] = ()) -> list[Path]:
        """Folders beside an artifact's that neither it needs, nor a generation of an atlas (see `generations`).

        The generations in the folders `without` do not count.
        """
        home, generations = self._home(manifest.stage, manifest.slug), self._generations(set(without))
        needed = {manifest.folder, *(path.name for path in generations if path.parent == home)}
        if manifest.stage != "activations":  # which nobody reads afterwards, and which are large
            needed |= {said[manifest.key]["folder"] for said in generations.values() if manifest.key in said}
        return [path for path in sorted(home.iterdir()) if path.is_dir() and path.name not in needed]

    def _generations(self, without: set[Path]) -> dict[Path, dict[str, Any]]:
        """What the generations that are kept are made of, by their folders."""
        files = (path for path in self.root.glob(f"{ATLAS}/*/*/{GENERATION}") if path.parent not in without)
        return {path.parent: json.loads(path.read_text("utf-8"))["manifests"] for path in files}

    def is_being_made(self, stage: str, slug: str) -> bool:
        """Whether some process is making the artifact now."""
        try:
            with FileLock(self._home(stage, slug) / ".lock", timeout=0):
                return False
        except Timeout:
            return True

    def _home(self, stage: str, slug: str) -> Path:
        if not slug or "/" in slug or "\\" in slug or slug.startswith("."):
            raise ArtifactError(f"{slug!r} is no name of an artifact: names hold no slash and begin with no dot")
        return self.root / stage / slug

    @contextmanager
    def _lock(self, stage: str, slug: str) -> Iterator[None]:
        """One maker at a time; the system frees the lock when its owner dies."""
        home = self._home(stage, slug)
        try:
            home.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ArtifactError(f"cannot write to {home}: {error.strerror}; set MIND_ATLAS_HOME elsewhere") from None
        with FileLock(home / ".lock"):  # when another run is making it: wait, then use what it made
            yield


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
