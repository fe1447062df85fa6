"""Dictionaries of other libraries, read into our form and written from it without loss; one module a format."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from sae_core.artifacts import new_folder
from sae_core.dictionary import Dictionary
from sae_core.interop import dictionary_learning, saelens, sparsify
from sae_core.interop.foreign import InteropError
from sae_core.names import Site

__all__ = ["FORMATS", "InteropError", "read", "write"]


class Format(NamedTuple):
    """What is known of a format."""

    files: tuple[str, str]
    """Config and weights."""
    read: Callable[[Path], Dictionary]
    write: Callable[[Dictionary, Path, Site | None], None]


FORMATS = {
    "saelens": Format(saelens.FILES, saelens.read, saelens.write),
    "dictionary_learning": Format(dictionary_learning.FILES, dictionary_learning.read, dictionary_learning.write),
    "sparsify": Format(sparsify.FILES, sparsify.read, sparsify.write),
}


def read(folder: Path, format: str | None = None) -> Dictionary:
    """The dictionary in a folder of another library, folded into our form.

    Args:
        folder: holds the files of one dictionary.
        format: a key of `FORMATS`; told from the files' names when it is not given.

    Raises:
        InteropError: the format is not known or cannot be told, or the folder is refused for what it holds.
    """
    return _format(format or _detect(folder)).read(folder)


def write(dictionary: Dictionary, folder: Path, format: str, site: Site | None = None) -> None:
    """Write a dictionary for another library into a new or empty folder.

    Args:
        dictionary: what is written.
        folder: made when it is not there.
        format: a key of `FORMATS`.
        site: where the dictionary reads, for the other library's metadata.

    Raises:
        InteropError: the format is not known, or cannot hold the dictionary exactly.
        ArtifactError: the folder holds something, or cannot be written to.
    """
    known = _format(format)
    if dictionary.config["architecture"] == "transcoder":
        raise InteropError("a transcoder is written in no other library's format: only autoencoders are")
    new_folder(folder)
    known.write(dictionary, folder, site)


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise InteropError(f"no format {name!r}: known are {', '.join(FORMATS)}")
    return FORMATS[name]


def _detect(folder: Path) -> str:
    found = [name for name, known in FORMATS.items() if all((folder / file).is_file() for file in known.files)]
    if len(found) == 1:
        return found[0]
    if found:
        raise InteropError(f"{folder} holds files of {' and '.join(found)}: say which format is meant")
    looked_for = "; ".join(f"{' and '.join(known.files)} ({name})" for name, known in FORMATS.items())
    raise InteropError(f"{folder} holds no dictionary that is known; looked for {looked_for}")
