"""How specific the names of features are, by how strongly they fire: rated 0 to 3 by a judge (Templeton et al. 2024).

The stages of an atlas on one dictionary of the sweep: its features, its neighbors, and labels with the one scorer.
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

from sae_core.features import build_features
from sae_core.labels import Labels, build_labels
from sae_core.labels.build import Ground
from sae_core.neighbors import build_neighbors
from sae_core.progress import Report, silent
from sae_core.study import FeatureSettings, LabelSettings, ModelSettings, NeighborSettings


class Rated(NamedTuple):
    """What the judge said."""

    judge: str
    levels: Float[np.ndarray, "features levels"]
    """Mean rating of each feature's texts at each activation level, the lowest first; NaN where there is none."""
    shuffled: Float[np.ndarray, " features"]
    """What another feature's name gets on the same texts."""


def rated(
    asked: LabelSettings, count: int, model: ModelSettings, corpus: Path, activations: Path, dictionary: Path,
    scratch: Path, device: str = "cpu", report: Report = silent,
) -> Rated:  # fmt: skip
    """Have features named and the names rated.

    Args:
        asked: who writes the names and rates them, and what it may cost; the key is OPENAI_API_KEY.
        count: features.
        model: the language model under study.
        corpus: folder of the text.
        activations: folder of the activations.
        dictionary: folder of the dictionary.
        scratch: folder for features, neighbors and labels.
        device: where the dictionary is run.
        report: progress.

    Raises:
        LabelError: there is no label writer, or it stopped answering.
    """
    features, neighbors, labels = (scratch / name for name in ("features", "neighbors", "labels"))
    for folder in (features, neighbors, labels):
        folder.mkdir(parents=True, exist_ok=True)
    build_features(FeatureSettings(), model, corpus, activations, dictionary, features, device, report)
    build_neighbors(NeighborSettings(), dictionary, neighbors, report)
    said = asked.model_dump() | {"features": count, "judged": count, "scorers": ["specificity"], "contrast": 0}
    wanted = LabelSettings.model_validate(said)
    build_labels(wanted, features, labels, report, ground=Ground(model, neighbors))
    scores = [score for row in Labels.open(labels).rows() for score in row.scores]
    levels = np.array([score.levels for score in scores], float).reshape(len(scores), -1)
    return Rated(wanted.model, levels, np.array([score.shuffled for score in scores], float))
