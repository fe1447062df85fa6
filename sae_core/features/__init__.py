"""What each feature does: when it fires, on what text, and which tokens it promotes.

    firings     dictionary on every activation, kept sparse, sorted by feature (scratch)
    examples    which firings are shown, and the text around them
    logits      tokens whose logit a feature raises and lowers
    build       the stage: features.parquet and examples.parquet
    reader      `Features`, the one reader of both
    detectors   how well a feature tells one kind of text from the rest

Reading needs no torch, so `build_features` and `best_detectors` are loaded when they are first asked for.
"""

from typing import TYPE_CHECKING, Any

from sae_core.features.reader import Example as Example
from sae_core.features.reader import FeatureRow as FeatureRow
from sae_core.features.reader import Features as Features
from sae_core.features.reader import Sample as Sample

if TYPE_CHECKING:
    from sae_core.features.build import build_features as build_features
    from sae_core.features.detectors import best_detectors as best_detectors


def __getattr__(name: str) -> Any:
    if name == "build_features":
        from sae_core.features.build import build_features

        return build_features
    if name == "best_detectors":
        from sae_core.features.detectors import best_detectors

        return best_detectors
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
