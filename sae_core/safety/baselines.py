"""What a feature has to be held against: a linear probe on raw activations, the words alone, and features at random."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from sae_core.prompt_reader import Pooled
from sae_core.safety.shapes import Random
from sae_core.separation import auc

PENALTIES = {"logisticregression__C": [1e-3, 1e-2, 1e-1, 1.0]}
"""Strengths of the probe's L2 penalty that five-fold cross-validation on the find prompts chooses from."""
RANDOM_FEATURES = 200


class Probe(NamedTuple):
    """A logistic regression on standardized mean activations."""

    model: Any
    direction: Float[np.ndarray, " d_model"]
    """Its weights in the units of the activations."""

    def scores(self, raw: Float[np.ndarray, "texts d_model"]) -> Float[np.ndarray, " texts"]:
        """Log-odds that each text is positive."""
        return self.model.decision_function(raw)


def fit_probe(positive: Float[np.ndarray, "p d_model"], negative: Float[np.ndarray, "n d_model"]) -> Probe:
    """The linear probe on raw activations, which the literature finds hard to beat."""
    pipeline = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    folds = min(5, len(positive), len(negative))
    search = GridSearchCV(pipeline, PENALTIES, scoring="roc_auc", cv=folds) if folds > 1 else pipeline
    search.fit(np.concatenate([positive, negative]), _targets(len(positive), len(negative)))
    best = search.best_estimator_ if folds > 1 else pipeline
    return Probe(best, best[-1].coef_[0] / best[0].scale_)


def fit_words(positive: Sequence[str], negative: Sequence[str]) -> Any:
    """Logistic regression on the words alone (tf-idf); its `decision_function` takes texts."""
    model = make_pipeline(TfidfVectorizer(token_pattern=r"\w+"), LogisticRegression(C=10.0, max_iter=2000))
    return model.fit([*positive, *negative], _targets(len(positive), len(negative)))


def random_features(live: np.ndarray, positive: Pooled, negative: Pooled, seed: int = 0) -> Random:
    """AUC (largest value over tokens) of features drawn from `live`: those that fire on some find prompt."""
    chosen = np.random.default_rng(seed).choice(live, min(RANDOM_FEATURES, len(live)), replace=False)
    if not len(chosen):
        return Random(0.5, 0.5)
    found = auc(positive.max[:, chosen].toarray(), negative.max[:, chosen].toarray())
    return Random(float(found.mean()), float(np.quantile(found, 0.95)))


def _targets(positive: int, negative: int) -> np.ndarray:
    return np.repeat([1, 0], [positive, negative])
