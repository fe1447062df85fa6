"""Study files: read, checked, and refused with the key, the value and the cure.

A list in the `[dictionary]` table is a sweep: one dictionary for each combination. So is `hook` or `layer` in
`[activations]`: each site has all of the dictionaries.
"""

import itertools
import json
import tomllib
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from sae_core.artifacts import write_atomically
from sae_core.errors import MindAtlasError
from sae_core.names import to_slug
from sae_core.study import Study

_TABLES = {"dictionaries": "dictionary", "sites": "activations"}
"""What a study's sweeps are called in its file."""


class StudyError(MindAtlasError):
    """A study file that cannot be used; the message names the file, the key and the cure."""


def load_study(path: Path) -> Study:
    """Read and check a study file; relative paths in it are taken from the file's own folder.

    The file's name is the study's, and its corpus's when none is given.

    Raises:
        StudyError: the file is missing, is no TOML, or holds an unknown key or a bad value.
    """
    try:
        study = _study(tomllib.loads(path.read_text("utf-8")), path)
    except FileNotFoundError:
        raise StudyError(f"no study file {path}: give the path of a .toml file, or a shipped study's name") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise StudyError(f"{path} is not a TOML file: {error}") from None
    except ValidationError as error:
        raise StudyError(f"{path}: {explain(error)}") from None
    except ValueError as error:
        raise StudyError(f"{path}: {error}") from None
    sites = [study.named(site).slug for site in study.sites]
    if twice := next((s for s in sites if sites.count(s) > 1), None):
        raise StudyError(f"{path}: two sites are called {twice}: only activations.hook and layer may be lists")
    slugs = [study.spec(d).slug for d in study.dictionaries]
    if twice := next((s for s in slugs if slugs.count(s) > 1), None):
        raise StudyError(f"{path}: two dictionaries are called {twice}: give each a `variant` of its own")
    return study


def _study(table: dict[str, Any], path: Path) -> Study:
    """The parsed table as a study. Raises ValueError (as which pydantic's ValidationError counts)."""
    table = _resolve_paths({**table, "name": to_slug(path.stem).replace(".", "-")}, path.parent)
    table["corpus"] = {"name": table["name"], **table.get("corpus", {})}
    table["dictionaries"] = _sweep("dictionary", table.pop("dictionary", {}))
    table["sites"] = _sweep("activations", table.pop("activations", {}))
    return Study.model_validate(table)


def _resolve_paths(table: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Sources that are paths (they begin with `.`, `/` or `~`) become absolute, seen from the study's folder."""

    def resolve(source: Any) -> Any:
        is_path = isinstance(source, str) and source.startswith((".", "/", "~"))
        return str((folder / Path(source).expanduser()).resolve()) if is_path else source

    def with_source(entry: Any) -> Any:
        return {**entry, "source": resolve(entry.get("source"))} if isinstance(entry, dict) else resolve(entry)

    for key in ("model", "corpus", "labels", "safety", "circuits"):
        if not isinstance(table.get(key, {}), dict):
            raise ValueError(f"{key}: must be a table, [{key}]")
    if "model" in table:
        table["model"] = with_source(table["model"])
    if "labels" in table:
        paths = {key: resolve(table["labels"][key]) for key in ("model", "embedder") if key in table["labels"]}
        table["labels"] = {**table["labels"], **paths}
    if concepts := table.get("safety", {}).get("folder"):
        table["safety"] = {**table["safety"], "folder": resolve(concepts)}
    if tasks := table.get("circuits", {}).get("folder"):
        table["circuits"] = {**table["circuits"], "folder": resolve(tasks)}
    if isinstance(table.get("dictionary"), dict) and (source := table["dictionary"].get("source")):
        sources = [resolve(s) for s in source] if isinstance(source, list) else resolve(source)
        table["dictionary"] = {**table["dictionary"], "source": sources}
    if isinstance(sources := table.get("corpus", {}).get("sources"), list):
        table["corpus"] = {**table["corpus"], "sources": [with_source(s) for s in sources]}
    return table


def _sweep(name: str, table: Any) -> list[dict[str, Any]]:
    """One table for each combination of the lists in the one of that name."""
    if not isinstance(table, dict):
        raise ValueError(f"{name}: must be a table, [{name}]")
    axes = [[(key, v) for v in (value if isinstance(value, list) else [value])] for key, value in table.items()]
    if empty := next((key for key, value in table.items() if value == []), None):
        raise ValueError(f"{name}.{empty}: the list is empty: give at least one value")
    return [dict(combination) for combination in itertools.product(*axes)]


def explain(error: ValidationError) -> str:
    """The first problem of a validation, as one line with the key, the value and the cure."""
    problem = error.errors()[0]
    key = ".".join(str(part) for part in problem["loc"] if not isinstance(part, int))
    first, _, rest = key.partition(".")
    key = ".".join(filter(None, [_TABLES.get(first, first), rest]))
    if problem["type"] == "extra_forbidden":
        known = ", ".join(sorted(_known_keys(problem["loc"])))
        return f"{key}: unknown key; known here: {known}"
    if problem["type"] == "missing":
        return f"{key}: missing; add it"
    message = problem["msg"].removeprefix("Value error, ")
    return f"{key} = {problem['input']!r}: {message}" if key else message


def _known_keys(location: tuple[int | str, ...]) -> set[str]:
    """The keys that the table holds in which the last part of `location` is unknown."""
    model: Any = Study
    for part in (p for p in location[:-1] if isinstance(p, str)):
        annotation = model.model_fields[part].annotation
        model = getattr(annotation, "__args__", (annotation,))[0] or annotation
    known = set(model.model_fields)
    return {_TABLES.get(key, key) for key in known - {"name"}} if model is Study else known


def save_study(study: Study, path: Path) -> None:
    """Write a study of one site and one dictionary as a file that `load_study` reads back; defaults are left out."""
    said = study.model_dump(mode="json", exclude_defaults=True, exclude={"name", "sites", "dictionaries"})
    own = {"activations": study.activations, "dictionary": study.dictionaries[0]}
    said |= {key: one.model_dump(mode="json", exclude_defaults=True) for key, one in own.items()}
    tables = {key: value for key, value in said.items() if isinstance(value, dict)}
    lines = [f"{key} = {_toml(value)}" for key, value in said.items() if key not in tables]
    for name, table in tables.items():
        lines += ["", f"[{name}]", *(f"{key} = {_toml(value)}" for key, value in table.items() if value is not None)]
    with write_atomically(path) as file:
        file.write_text("\n".join(lines) + "\n", "utf-8")


def _toml(value: Any) -> str:
    """A value as TOML has it: JSON but for tables, which are inline here, and DEL, which is escaped."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} = {_toml(v)}" for key, v in value.items() if v is not None) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
