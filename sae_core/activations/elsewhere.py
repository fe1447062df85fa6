"""Activations kept away from the rest of the atlas: at any URL that fsspec knows (`s3://`, `gs://`, `file://`).

A shard's file in the artifact then holds places and sums, and the SHA-256 of its activations; these lie under the
shard's name at the URL, and are read through copies on this machine's disk.
"""

import hashlib
import json
import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import fsspec
import torch
from jaxtyping import UInt8
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sae_core.activations.encoding import ActivationError
from sae_core.artifacts import file_sha256
from sae_core.catalog import cache_dir

ELSEWHERE = "elsewhere.json"
"""There when the activations are not: says the URL of the folder that has them."""
COPY_BYTES = 16 << 30
"""Copies kept on this machine, of all sites together; the one that was not read for longest goes first."""
DIGEST = "sha256"
"""Column of a shard that has the SHA-256 of its activations."""
_PIECE = 4 << 20


class Elsewhere:
    """A folder at a URL."""

    def __init__(self, url: str) -> None:
        """Raises ActivationError when fsspec has no way to such a URL."""
        self.url = url.rstrip("/")
        with self._said("reach"):
            self._system, self._root = fsspec.url_to_fs(self.url)

    @classmethod
    def of(cls, folder: Path) -> "Elsewhere":
        """Where the activations of an artifact lie."""
        return cls(json.loads((folder / ELSEWHERE).read_text("utf-8"))["url"])

    def put(self, path: Path, name: str) -> UInt8[Tensor, "32"]:
        """Upload a file; it appears under its name when it is there as a whole. Returns its SHA-256."""
        with self._said("write", name):
            self._system.makedirs(self._root, exist_ok=True)
            self._system.put_file(str(path), f"{self._root}/{name}.tmp")
            self._system.mv(f"{self._root}/{name}.tmp", f"{self._root}/{name}")
        return torch.frombuffer(bytearray.fromhex(file_sha256(path)), dtype=torch.uint8)

    def sha256(self, name: str) -> str:
        """SHA-256 of a file as it is there now; empty when it is not."""
        digest = hashlib.sha256()
        with self._said("read", name):
            if not self._system.exists(f"{self._root}/{name}"):
                return ""
            with self._system.open(f"{self._root}/{name}", "rb") as file:
                while piece := file.read(_PIECE):
                    digest.update(piece)
        return digest.hexdigest()

    def bytes(self) -> int:
        """Bytes of all files in the folder."""
        with self._said("read"):
            return int(self._system.du(self._root))

    def get(self, name: str, path: Path) -> None:
        """Download a file."""
        with self._said("read", name):
            self._system.get_file(f"{self._root}/{name}", str(path))

    def keep_only(self, folder: str) -> None:
        """Remove every other folder beside the one of that name: older versions that nothing refers to any more."""
        with self._said("clear"):
            for other in self._system.ls(self._root, detail=False) if self._system.exists(self._root) else []:
                if other.rstrip("/").rpartition("/")[2] != folder:
                    self._system.rm(other, recursive=True)

    @contextmanager
    def _said(self, what: str, name: str = "") -> Iterator[None]:
        try:
            yield
        except (OSError, ImportError, ValueError) as error:  # fsspec's: a protocol that needs a package, or is none
            place = f"{getattr(self, 'url', '')}/{name}".rstrip("/")
            raise ActivationError(
                f"cannot {what} {place}: {error or type(error).__name__}: look at the network, the credentials and "
                "MIND_ATLAS_ACTIVATIONS"
            ) from error


class Copies:
    """A split's activations that lie elsewhere, copied to this machine as they are read; safe to use from threads."""

    def __init__(self, folder: Path, paths: list[Path]) -> None:
        """`paths` are the shards in the artifact's folder, which know the checksums."""
        self._source, self._paths = Elsewhere.of(folder), paths
        self._folder, self._lock = cache_dir() / "activations", threading.Lock()

    def path(self, number: int) -> Path:
        """The copy of a shard's activations, whole and checked.

        Raises ActivationError when it cannot be fetched, or is not what was uploaded.
        """
        name, wanted = self._paths[number].name, stored_digest(self._paths[number])
        copy = self._folder / wanted
        with self._lock:
            if not copy.exists():
                self._folder.mkdir(parents=True, exist_ok=True)
                temporary = copy.with_name(f"{wanted}.{os.getpid()}.tmp")
                self._source.get(name, temporary)
                if file_sha256(temporary) != wanted:
                    temporary.unlink()
                    raise ActivationError(f"{self._source.url}/{name} is damaged: run `mind-atlas verify --repair`")
                temporary.replace(copy)
                self._make_room(copy)
            os.utime(copy)
        return copy

    def _make_room(self, newest: Path) -> None:
        """Drop the copies that were not read for longest."""
        copies = sorted(self._folder.iterdir(), key=lambda path: path.stat().st_mtime)
        excess = sum(path.stat().st_size for path in copies) - COPY_BYTES
        for path in copies:
            if excess <= 0 or path == newest:
                continue
            excess -= path.stat().st_size
            path.unlink(missing_ok=True)


def stored_digest(path: Path) -> str:
    """SHA-256 of the activations that belong to a shard in the artifact's folder."""
    try:
        with safe_open(path, framework="pt") as file:
            return bytes(file.get_tensor(DIGEST).tolist()).hex()
    except (OSError, SafetensorError) as error:
        raise ActivationError(f"{path} cannot be read ({error}): run `mind-atlas verify --repair`") from None


def damage(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """Which of the folder's shards have activations elsewhere that are not as they were uploaded, and why.

    Raises ActivationError when the place cannot be reached, which says nothing of what is there.
    """
    source, found = Elsewhere.of(folder), {}
    for name in names:
        if name.startswith(("train-", "held_out-")) and (digest := source.sha256(name)) != stored_digest(folder / name):
            found[name] = f"{source.url}/{name} {'has other content than was written' if digest else 'is missing'}"
    return found


def forget_older(folder: Path) -> None:
    """Remove the activations elsewhere of this artifact's older versions. Raises ActivationError if that fails."""
    if (folder / ELSEWHERE).exists():
        parent, _, name = Elsewhere.of(folder).url.rpartition("/")
        Elsewhere(parent).keep_only(name)
