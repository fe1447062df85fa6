"""Concepts as data: one TOML file each, with what it is about and where its prompts come from.

    name = "immunology"
    kind = "calibration"
    description = "Immune systems, antibodies, vaccines."
    about = "(?i)immun|antibod"               # says whether a stretch of the corpus is about it: a stand-in for a judge
    about_sources = []                       # what is known to be, from end to end: wiki-fr, for French

    [[positive]]
    source = "wiki-en"                       # a catalog name or a path, as in a study
    having = "immun|antibod"

    [[negative]]
    source = "wiki-en"
    without = "immun|antibod"

A user's file in a folder of their own is as good as a shipped one, and one of the same name takes its place.
"""

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from sae_core.catalog import identify_text
from sae_core.errors import MindAtlasError
from sae_core.settings import Settings
from sae_core.study import SafetySettings, Source
from sae_core.toml_files import read_toml

SHIPPED = Path(__file__).with_name("concepts")
Generator = Literal[
    "dna", "base64_text", "hexadecimal", "letters", "digits", "citations", "places", "buggy_code", "working_code"
]
Kind = Literal["safety", "calibration"]
Where = Literal["text", "token"]


class ConceptError(MindAtlasError):
    """A concept file that cannot be used; the message names the file, the key and the cure."""


class Split(Settings):
    """Prompts, or sentences with slots, that are written out."""

    find: list[str] = Field(default=[])
    test: list[str] = Field(default=[])


class Rule(Settings):
    """Where prompts come from: exactly one of `source`, `generator`, `prompts` and `templates`."""

    source: str = ""
    """A catalog name, or a path to text, JSONL or Parquet (see `Source`)."""
    having: str = ""
    """Regular expression that a document's piece must match; the piece is taken around the first match."""
    without: str = ""
    """Regular expression that it must not match."""
    characters: int = Field(120, ge=8, le=4000)
    """Length of a piece, cut at spaces."""
    pieces: int = Field(1, ge=1)
    """Pieces taken from one document, one after the other; all go into the same split."""
    upper: bool = False
    """In capital letters."""
    generator: Generator | None = None
    """A function of `made_texts`."""
    prompts: Split | None = None
    """As they are."""
    templates: Split | None = None
    """Sentences with `{slots}`; those that find and those that test share no sentence."""
    fillers: dict[str, list[str]] = Field(default={})
    """What goes into each slot."""
    license: str = ""
    """License of prompts that are written out here."""

    @model_validator(mode="after")
    def _one_origin(self) -> "Rule":
        given = [key for key in ("source", "generator", "prompts", "templates") if getattr(self, key)]
        if len(given) != 1:
            raise ValueError(f"give exactly one of source, generator, prompts, templates, and not {given or 'none'}")
        for template in [*self.templates.find, *self.templates.test] if self.templates else []:
            if lacking := [slot for slot in re.findall(r"\{(\w+)\}", template) if not self.fillers.get(slot)]:
                raise ValueError(f"fillers.{lacking[0]} is missing, which {template!r} needs")
        return self

    @field_validator("having", "without")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        return _compiled(pattern)


class Sides(Settings):
    """Positives and negatives of another origin, for a test out of distribution."""

    positive: list[Rule] = Field(min_length=1)
    negative: list[Rule] = Field(min_length=1)


class Sizes(Settings):
    """Prompts a side in each split."""

    find: int = Field(40, ge=2)
    """To choose features and fit the baselines."""
    calibrate: int = Field(40, ge=0)
    """To set a monitor's thresholds."""
    test: int = Field(40, ge=2)
    """To judge."""


class Concept(Settings):
    """What is looked for."""

    name: str = Field(pattern=r"^[a-z0-9_]+$")
    kind: Kind
    """`safety`: what a safety team asks for. `calibration`: what any method should find."""
    description: str
    about: str
    """Regular expression: whether a stretch of the corpus is about the concept. A stand-in for a judge."""
    where: Where = "text"
    """What must match it: the `text` around a firing, or the `token` itself, where any text may hold a few such."""
    about_sources: list[str] = Field(default=[])
    """Sources that are about it from end to end, by the names that a corpus's documents have: no pattern is asked of
    their text. One that a corpus lacks says nothing."""
    source: str = ""
    """Where the prompts come from, in words."""
    license: str = ""
    """Of the prompts."""
    sizes: Sizes = Sizes()
    negatives: Sizes | None = None
    """Sizes of the negative side, where a rate of false alarms needs more."""
    positive: list[Rule] = Field(min_length=1)
    negative: list[Rule] = Field(min_length=1)
    shifted: Sides | None = None
    """Out of distribution: judged only, never used to find."""

    @field_validator("about")
    @classmethod
    def _compiles(cls, pattern: str) -> str:
        return _compiled(pattern)

    @property
    def identity(self) -> dict[str, Any]:
        """All that its prompts depend on, for a fingerprint: this file, and the text it names."""
        rules = [*self.positive, *self.negative]
        if self.shifted:
            rules += [*self.shifted.positive, *self.shifted.negative]
        texts = sorted({identify_text(Source(source=rule.source)) for rule in rules if rule.source})
        return {"sha256": hashlib.sha256(self.model_dump_json().encode()).hexdigest(), "texts": texts}


def load_concepts(*folders: Path, names: Iterable[str] = ()) -> list[Concept]:
    """The concepts of the folders, sorted by name; a later folder's takes the place of an earlier one's.

    Args:
        folders: each holds `*.toml`; none: the shipped ones.
        names: load these only.

    Raises:
        ConceptError: a folder holds no concept, a file is no concept, or a name is unknown.
    """
    found: dict[str, Concept] = {}
    for folder in folders or (SHIPPED,):
        files = sorted(folder.glob("*.toml"))
        if not files:
            raise ConceptError(f"{folder} holds no concept: put .toml files into it, or name another folder")
        found |= {concept.name: concept for concept in map(load_concept, files)}
    wanted = list(names) or sorted(found)
    if unknown := [name for name in wanted if name not in found]:
        raise ConceptError(f"no concept {unknown[0]!r}: known are {', '.join(sorted(found))}")
    return [found[name] for name in sorted(set(wanted))]


def concepts_of(settings: SafetySettings) -> list[Concept]:
    """The concepts that a study's audit is about. Raises ConceptError as `load_concepts`."""
    own = [Path(settings.folder).expanduser()] if settings.folder else []
    return load_concepts(SHIPPED, *own, names=settings.concepts)


def load_concept(path: Path) -> Concept:
    """Read and check one file; paths in it are taken from its own folder. Raises ConceptError."""
    return read_toml(path, Concept, ConceptError, lambda table: _resolved(table, path.parent))


def _resolved(value: Any, folder: Path) -> Any:
    """Sources that are paths become absolute, as in a study."""
    if isinstance(value, list):
        return [_resolved(item, folder) for item in value]
    if not isinstance(value, dict):
        return value
    resolved = {key: _resolved(item, folder) for key, item in value.items()}
    source = resolved.get("source")
    if isinstance(source, str) and source.startswith(("./", "../", "~")):
        resolved["source"] = str((folder / Path(source).expanduser()).resolve())
    return resolved


def _compiled(pattern: str) -> str:
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression ({error})") from None
    return pattern
