"""Which features are reported: by rule, not by hand."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq

from sae_core.steering_scores import SCORES
from sae_core.steering_texts import Subject, Text, concept_rate
from sae_core.study import SteeringReportSettings


class Chosen(NamedTuple):
    """A feature that is reported."""

    feature: int
    output_score: float
    concept: list[str]
    """Its words."""


def choose_features(
    subject: Subject,
    scores: Path,
    settings: SteeringReportSettings,
    rates: Mapping[str, float],
    base_texts: Sequence[Text],
) -> list[Chosen]:
    """The features of the highest output scores that have words of their own for the judge to look for.

    Words that are said anyway cannot be said ten times as often. Only words count that are rare by `rates`, those of
    the corpus (see `Subject.concept`), and only features whose words together are rare in `base_texts`, those of the
    model as it is on the prompts that choose.
    """
    table = pq.read_table(scores / SCORES, columns=["feature", "output_score"]).to_pylist()
    scored = sorted((r for r in table if r["output_score"] is not None), key=lambda r: -r["output_score"])
    found: list[Chosen] = []
    for row in scored:
        if len(found) == settings.features:
            break
        concept = subject.concept(subject.features.feature(row["feature"]), rates, settings.word_rate_max)
        said = np.mean([concept_rate(subject, text, set(concept)) for text in base_texts])
        if len(concept) >= settings.words_min and said <= settings.base_rate_max:
            found.append(Chosen(row["feature"], row["output_score"], concept))
    return found
