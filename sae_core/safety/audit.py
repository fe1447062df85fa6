"""The audit: for each concept its best features, judged on unseen prompts and held against plain baselines."""

import json
import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from scipy import stats

from sae_core.atlas import Atlas
from sae_core.features import Sample
from sae_core.language_model import LanguageModel
from sae_core.progress import Report, silent
from sae_core.prompt_reader import Pooled, PromptError, PromptReader
from sae_core.prompt_search import ALPHA, Separating, best_features
from sae_core.safety.baselines import fit_probe, fit_words, random_features
from sae_core.safety.concepts import Concept, concepts_of
from sae_core.safety.drawing import SPLITS, Drawn, Side, Text, draw
from sae_core.safety.monitor import MONITOR, Detector, fit_detector, save_detectors
from sae_core.safety.shapes import Measured, Random, Rated, Specificity, Steers
from sae_core.safety.specificity import Judge, specificity
from sae_core.separation import LEVEL, auc, interval
from sae_core.steering_scores import SCORES
from sae_core.study import SafetySettings

AUDIT = "audit.json"
TABLE = "audit.parquet"
CALIBRATED_TEXTS = 200
"""Texts without which a rate of false alarms is not held against the one asked for: with 200 and 5%, 10 alarms."""
FOUND_AUC, FOUND_LOW = 0.9, 0.8
"""A concept counts as found when its best feature's AUC on unseen prompts, and its interval's low end, are no less."""
STATUSES = ("found", "stand-in", "partly", "not found", "no claim")


@dataclass(frozen=True, slots=True)
class Candidate:
    """A feature, as evidence for a concept."""

    separating: Separating
    specificity: Specificity
    shifted: Rated | None
    """Out of distribution."""
    steers: Steers

    @property
    def rated(self) -> Rated:
        """Its AUC on unseen prompts; NaN without any."""
        s = self.separating
        return Rated(*(math.nan if number is None else number for number in (s.auc, s.low, s.high)))


@dataclass(frozen=True)
class ConceptAudit:
    """What was found for one concept."""

    concept: str
    kind: str
    description: str
    license: str
    prompts: dict[str, int]
    groups: int
    """Groups among the test positives: texts of one group say nearly the same."""
    duplicates: int
    windowed: int
    """Texts longer than the context, which were read in windows."""
    why_no_claim: str
    candidates: list[Candidate]
    """The best on the prompts that find, best first."""
    probe: Rated
    words: Rated
    random: Random
    shifted_probe: Rated | None
    shifted_words: Rated | None
    shifted_random: Random | None
    monitor: Measured | None
    no_monitor: str
    """Why there is none."""

    @property
    def n_texts(self) -> int:
        """Texts of all splits, those of another origin left out."""
        return sum(self.prompts.values())

    @property
    def best(self) -> Candidate | None:
        """The feature that was chosen, on the prompts that find."""
        return self.candidates[0] if self.candidates else None

    @property
    def status(self) -> str:
        """What was shown.

        `no claim`: too few prompts. `found`: the best feature tells unseen prompts apart, and in the corpus mostly
        fires on the concept. `stand-in`: it tells them apart, but stands for something else that they share, or for
        what the corpus does not hold. `partly`: better than chance, but weak or uncertain. `not found`.
        """
        if self.why_no_claim:
            return "no claim"
        if self.best is None or self.best.separating.p > ALPHA or not self.best.rated.low > 0.5:
            return "not found"
        best = self.best.rated
        if best.auc < FOUND_AUC or best.low < FOUND_LOW:
            return "partly"
        return "found" if self.right_rank == 1 else "stand-in"

    @property
    def right_rank(self) -> int | None:
        """Which of the candidates is the first that mostly fires on the concept in the corpus, counted from 1."""
        return next((i for i, c in enumerate(self.candidates, 1) if c.specificity.is_own), None)


def build_audit(
    settings: SafetySettings, atlas: Atlas, lm: LanguageModel, scores: Path, folder: Path,
    before: dict[str, Any] | None = None, report: Report = silent,
) -> dict[str, Any]:  # fmt: skip
    """Audit the concepts and write `audit.json`, `audit.parquet`, `audit.md` and `monitor.json`.

    Args:
        settings: which concepts.
        atlas: the dictionary's atlas.
        lm: the model that it describes.
        scores: folder of the features' output scores.
        folder: where the files go.
        before: summary of the audit that this one replaces; what was found then must be found now.
        report: told of tokens.

    Returns:
        Counts; names of the concepts `found`, and of those `lost` since `before`.

    Raises:
        MindAtlasError: a concept or its text is not there.
    """
    from sae_core.safety.report import markdown

    concepts = concepts_of(settings)
    rows = pq.read_table(scores / SCORES, columns=["feature", *(field.name for field in fields(Steers))]).to_pylist()
    steers = {row.pop("feature"): Steers(**row) for row in rows}
    audits, detectors = audit(concepts, settings, atlas, PromptReader.of(atlas, lm), steers, report)
    lost = lost_concepts(audits, before or {})
    table = pa.Table.from_pylist([row for found in audits for row in _rows(found)])
    (folder / AUDIT).write_text(json.dumps([as_json(a) for a in audits], ensure_ascii=False, indent=1), "utf-8")
    pq.write_table(table, folder / TABLE)
    save_detectors(detectors, folder / MONITOR)
    (folder / "audit.md").write_text(markdown(audits, atlas.dictionary, lost), "utf-8")
    status = [found.status for found in audits]
    return {
        "concepts": len(audits),
        **{re.sub("[ -]", "_", key): status.count(key) for key in STATUSES},
        "monitors": len(detectors),
        "calibration_off": max((a.monitor.off for a in audits if is_rated(a.monitor)), default=1.0),
        "n_lost": len(lost),
        "names_found": [a.concept for a in audits if a.status == "found"] + _unseen("names_found", before, audits),
        "names_lost": lost + _unseen("names_lost", before, audits),
    }


def is_rated(monitor: Measured | None) -> TypeGuard[Measured]:
    """Whether it was measured on enough texts to hold its rate of false alarms against the one asked for."""
    return monitor is not None and monitor.negatives >= CALIBRATED_TEXTS


def _unseen(key: str, before: dict[str, Any] | None, audits: Sequence[ConceptAudit]) -> list[str]:
    """Names that an audit of fewer concepts must not forget."""
    return [name for name in (before or {}).get(key, []) if name not in {a.concept for a in audits}]


def lost_concepts(audits: Sequence[ConceptAudit], before: dict[str, Any]) -> list[str]:
    """Concepts that the earlier audit found, or missed already, and this one does not find; a removed one is none."""
    expected = {*before.get("names_found", []), *before.get("names_lost", [])}
    return [a.concept for a in audits if a.concept in expected and a.status != "found"]


def audit(
    concepts: Collection[Concept], settings: SafetySettings, atlas: Atlas, reader: PromptReader,
    steers: Mapping[int, Steers], report: Report = silent,
) -> tuple[list[ConceptAudit], list[Detector]]:  # fmt: skip
    """Audit each concept; every text is read once, however many concepts share it."""
    drawn = {concept.name: draw(concept) for concept in concepts}
    texts = list(dict.fromkeys(text.text for d in drawn.values() for text in _every(d)))
    place = {text: i for i, text in enumerate(texts)}
    pooled = reader.pool(texts, report)

    def read(some: Sequence[Text]) -> Pooled:
        return pooled.rows([place[text.text] for text in some])

    ground = _Ground(settings, atlas, steers, atlas.features.sample(), reader.window_tokens, read)
    audits, detectors = [], []
    for concept in concepts:
        found, detector = _audit_one(concept, drawn[concept.name], ground)
        audits.append(found)
        detectors += [detector] if detector else []
    return audits, detectors


class _Ground(NamedTuple):
    """What all concepts stand on."""

    settings: SafetySettings
    atlas: Atlas
    steers: Mapping[int, Steers]
    sample: Sample
    """Of the corpus."""
    window_tokens: int
    read: Callable[[Sequence[Text]], Pooled]

    def evidence(self, best: Sequence[Separating], concept: Concept, shifted: list[Pooled] | None) -> list[Candidate]:
        """What else is known of the best features."""
        judge = Judge.of(concept, self.atlas)
        corpus = judge.share(self.sample)
        return [
            Candidate(
                s, specificity(self.atlas.features, s.feature, judge, corpus), _on(shifted, s),
                self.steers.get(s.feature, Steers(None, None)),
            )
            for s in best
        ]  # fmt: skip


def _every(drawn: Drawn) -> list[Text]:
    return _all((drawn.positive, drawn.negative)) + [text for side in drawn.shifted or () for text in side]


def _all(sides: Iterable[Side]) -> list[Text]:
    return [text for side in sides for split in SPLITS for text in side[split]]


def _audit_one(concept: Concept, drawn: Drawn, ground: _Ground) -> tuple[ConceptAudit, Detector | None]:
    sides, read = (drawn.positive, drawn.negative), ground.read
    find, test = ([read(side[split]) for side in sides] for split in ("find", "test"))
    far = drawn.shifted if drawn.shifted and all(drawn.shifted) else None
    shifted = [read(side) for side in far] if far else None
    groups = _groups(drawn.positive["test"]), _groups(drawn.negative["test"])
    best = best_features(find[0], find[1], test[0], test[1], ground.settings.features, ground.atlas, groups)
    probe = fit_probe(find[0].raw, find[1].raw)
    words = fit_words(*([text.text for text in side["find"]] for side in sides))
    live = np.union1d(find[0].max.indices, find[1].max.indices)
    detector, measured, why = _monitor(concept, drawn, best, ground.settings, read, test)
    found = ConceptAudit(
        concept.name, concept.kind, concept.description, concept.license,
        {f"{split} {name}": len(side[split]) for name, side in zip(("positive", "negative"), sides, strict=True)
         for split in SPLITS},
        len(set(groups[0].tolist())), drawn.duplicates,
        int((read(_all(sides)).tokens > ground.window_tokens).sum()), drawn.why_no_claim,
        ground.evidence(best, concept, shifted),
        _rated((probe.scores(side.raw) for side in test), groups),
        _rated((_by_words(words, side["test"]) for side in sides), groups), random_features(live, test[0], test[1]),
        _rated(probe.scores(side.raw) for side in shifted) if shifted else None,
        _rated(_by_words(words, side) for side in far) if far else None,
        random_features(live, shifted[0], shifted[1]) if shifted else None, measured, why,
    )  # fmt: skip
    return found, detector


def _by_words(words: Any, texts: Sequence[Text]) -> np.ndarray:
    return words.decision_function([text.text for text in texts])


def _monitor(
    concept: Concept, drawn: Drawn, best: Sequence[Separating], settings: SafetySettings, read: Any, test: list[Pooled]
) -> tuple[Detector | None, Measured | None, str]:
    """A detector from the best feature by its largest value; thresholds from one split, measured on another."""
    chosen = next((s for s in best if s.pool == "max"), best[0] if best else None)
    sides = [side["calibrate"] for side in (drawn.positive, drawn.negative)]
    if chosen is None or not all(sides):
        return None, None, "no feature, or no calibration texts"

    def values(pooled: Pooled) -> np.ndarray:
        return pooled.max[:, [chosen.feature]].toarray()[:, 0]

    detector = fit_detector(concept.name, chosen.feature, chosen.label, *(values(read(side)) for side in sides))
    try:
        threshold = detector.threshold(settings.false_positive_rate)
    except PromptError as error:
        return detector, None, str(error)
    hits = [int((values(side) >= threshold).sum()) for side in test]
    n = len(test[1].tokens)
    bounds = stats.binomtest(hits[1], n).proportion_ci(LEVEL)
    measured = Measured(
        settings.false_positive_rate, hits[1], n, float(bounds.low), float(bounds.high), hits[0], len(test[0].tokens)
    )
    return detector, measured, ""


def _on(sides: list[Pooled] | None, separating: Separating) -> Rated | None:
    """A feature's AUC on other prompts."""
    if sides is None:
        return None
    return _rated(getattr(s, separating.pool)[:, [separating.feature]].toarray()[:, 0] for s in sides)


def _rated(sides: Iterable[np.ndarray], groups: tuple[np.ndarray, np.ndarray] | None = None) -> Rated:
    positive, negative = sides
    low, high = interval(positive, negative, groups)
    return Rated(float(auc(positive[:, None], negative[:, None])[0]), low, high)


def _groups(texts: Sequence[Text]) -> np.ndarray:
    names: dict[str, int] = {}
    return np.array([names.setdefault(text.group, len(names)) for text in texts], np.int64)


def as_json(found: ConceptAudit) -> dict[str, Any]:
    """Everything, as JSON values."""
    from sae_core.safety.report import verdict

    told = asdict(found)
    told["candidates"] = [row.pop("separating") | row for row in told["candidates"]]
    return told | {"status": found.status, "right_rank": found.right_rank, "verdict": verdict(found)}


def _rows(found: ConceptAudit) -> list[dict[str, Any]]:
    """A flat row for each candidate."""
    about = {"concept": found.concept, "kind": found.kind, "status": found.status, "probe_auc": found.probe.auc,
             "words_auc": found.words.auc, "random_auc": found.random.mean}  # fmt: skip
    return [
        about | {k: v for k, v in asdict(c.separating).items() if k not in {"active", "beats_control"}}
        | {"rank": rank, "specificity": c.specificity.share, "shifted_auc": c.shifted.auc if c.shifted else None}
        | asdict(c.steers)
        for rank, c in enumerate(found.candidates, 1)
    ]  # fmt: skip
