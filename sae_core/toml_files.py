"""Settings in a TOML file that a person wrote: read, checked, and refused with the key that is wrong."""

import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from sae_core.errors import MindAtlasError
from sae_core.settings import Settings

S = TypeVar("S", bound=Settings)


def read_toml(
    path: Path, kind: type[S], error: type[MindAtlasError], prepare: Callable[[Any], Any] = lambda table: table
) -> S:
    """What a file says, as `kind`, whose table `prepare` may change first.

    Raises `error` when it cannot be read, is not TOML in UTF-8, or says what `kind` refuses.
    """
    try:
        return kind.model_validate(prepare(tomllib.loads(path.read_text("utf-8"))))
    except UnicodeDecodeError:
        raise error(f"{path} is not UTF-8: save it as UTF-8") from None
    except tomllib.TOMLDecodeError as cause:
        raise error(f"{path} is not a TOML file: {cause}") from None
    except OSError as cause:
        raise error(f"cannot read {path}: {cause.strerror}") from None
    except ValidationError as refused:
        problem = refused.errors()[0]
        key = ".".join(map(str, problem["loc"]))
        why = "unknown key: take it out" if problem["type"] == "extra_forbidden" else problem["msg"]
        raise error(f"{path}: {key}: {why.removeprefix('Value error, ')}") from None
