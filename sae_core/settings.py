"""`Settings`: the frozen base of everything a study can set, and the fingerprint that caching stands on."""

import hashlib
import json
from typing import Any

from pydantic import BaseModel, ConfigDict

DOCUMENTED = ConfigDict(use_attribute_docstrings=True)
"""`__pydantic_config__` of a dataclass whose fields' docstrings are their descriptions in a schema."""


class Settings(BaseModel):
    """Frozen; unknown keys are refused; the string under a field is its description."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    def fingerprint(self) -> str:
        """Sixteen hexadecimal digits that change when, and only when, a setting does."""
        return fingerprint(self.model_dump(mode="json"))


def fingerprint(value: Any) -> str:
    """Sixteen hexadecimal digits of the SHA-256 of `value` as canonical JSON (sorted keys, no spaces).

    Raises:
        TypeError: `value` holds something that JSON has no form for.
        ValueError: `value` holds NaN or an infinity.
    """
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
