"""What was made on request of a dictionary, as pages and as JSON: the safety audit and the multilingual report."""

import json
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import HTMLResponse

from sae_core.artifacts import Made
from sae_core.atlas import Atlas
from sae_core.safety.shapes import Effect, Measured, Random, Rated, Specificity, Steers
from sae_core.safety.words import CAVEATS
from sae_core.serve.render import page
from sae_core.serve.shapes import Named, View
from sae_core.serve.shelf import ChosenAtlas
from sae_core.serve.views import NotFoundError, names
from sae_core.stages import report_of

router = APIRouter(responses={404: {"description": "There is no such thing, or the report was not made yet."}})

_CURES = {"safety": "mind-atlas audit", "behaviors": "mind-atlas behaviors", "multilingual": "mind-atlas multilingual"}


class Candidate(Named):
    """One of the best features for a concept, chosen on the prompts that find."""

    pool: str
    """Over tokens: `max` or `mean`."""
    find_auc: float
    p: float
    """Chance without a difference, corrected for all that was tried."""
    effect: float
    active: tuple[float, float]
    auc: float | None
    low: float | None
    high: float | None
    specificity: Specificity
    shifted: Rated | None
    """Out of distribution."""
    steers: Steers


class ConceptView(View):
    """What the audit shows of a concept, and what it does not."""

    concept: str
    kind: str
    description: str
    license: str
    status: str
    """`found`, `stand-in`, `partly`, `not found` or `no claim`."""
    verdict: str
    right_rank: int | None
    prompts: dict[str, int]
    groups: int
    duplicates: int
    windowed: int
    why_no_claim: str
    candidates: list[Candidate]
    probe: Rated
    words: Rated
    random: Random
    shifted_probe: Rated | None
    shifted_words: Rated | None
    shifted_random: Random | None
    monitor: Measured | None
    no_monitor: str


class AuditView(View):
    """The safety audit of a dictionary."""

    dictionary: str
    made_at: str
    caveats: str
    """What none of its numbers shows."""
    lost: list[str]
    """Concepts that an earlier audit found."""
    concepts: list[ConceptView]


class BehaviorView(View):
    """A choice between two ways to go on."""

    name: str
    description: str
    concept: str
    """Of the audit, whose features are steered."""
    instruction: str
    """Words that ask for the opposite."""
    one_means: str
    other_means: str
    """What the two ways are; log-odds are of the one over the other."""
    n_items: int


class BehaviorsView(View):
    """What steering does to behaviors."""

    behaviors: list[BehaviorView]
    effects: list[Effect]


class Example(View):
    """A text in one language."""

    language: str
    tokens: list[str]
    acts: list[float]
    """The feature's activation on each token."""


class Shared(Named):
    """A feature that fires on the same content in several languages."""

    languages: int
    """On how many it fires at all."""
    same: float
    """Share of the items on which it fires in enough languages."""
    same_shuffled: float
    score: float
    """Mean correlation over pairs of languages."""
    score_high: float
    """What the luckiest of all features has in 95% of the shuffles."""
    items: list[int]
    examples: list[list[Example]]
    """By item, then language; of the best features only."""


class ParallelView(View):
    """What one parallel text shows."""

    name: str
    languages: list[str]
    items: int
    similarity: float
    similarity_shuffled: float
    retrieved: float
    """Share of items whose nearest in another language is the same item."""
    retrieved_raw: float
    """The same by raw activations: the baseline."""
    by_pair: dict[str, float]
    n_tried: int
    features: list[Shared]


class MultilingualView(View):
    """The multilingual report of a dictionary."""

    dictionary: str
    made_at: str
    texts: list[ParallelView]


@router.get("/api/audit", tags=["atlas"])
def audit(atlas: ChosenAtlas) -> AuditView:
    """For each concept the best features, judged on unseen prompts, beside plain baselines; and a verdict in words."""
    made = _report(atlas, "safety")
    return AuditView(
        dictionary=atlas.dictionary, made_at=made.manifest.made_at, caveats=CAVEATS,
        lost=made.manifest.summary["names_lost"],
        concepts=[
            ConceptView(**row | {"candidates": _named(atlas, row["candidates"])}) for row in _json(made, "audit.json")
        ],
    )  # fmt: skip


@router.get("/audit", response_class=HTMLResponse, include_in_schema=False)
def audit_page(request: Request, atlas: ChosenAtlas) -> HTMLResponse:
    """The audit's tables and verdicts."""
    shown = behaviors(atlas) if report_of(atlas.store, "behaviors", atlas.dictionary) else None
    return page(request, "audit.html", dictionary=atlas.dictionary, view=audit(atlas), behaviors=shown)


@router.get("/api/behaviors", tags=["atlas"])
def behaviors(atlas: ChosenAtlas) -> BehaviorsView:
    """What steering with the features of the audit does to a few behaviors, against random controls and words."""
    return BehaviorsView(**_json(_report(atlas, "behaviors"), "behaviors.json"))


@router.get("/api/multilingual", tags=["atlas"])
def multilingual(atlas: ChosenAtlas) -> MultilingualView:
    """Which features fire on the same content across languages, against shuffled pairs."""
    made = _report(atlas, "multilingual")
    rows = [
        ParallelView(**row | {"features": _named(atlas, row["features"])}) for row in _json(made, "multilingual.json")
    ]
    return MultilingualView(dictionary=atlas.dictionary, made_at=made.manifest.made_at, texts=rows)


@router.get("/multilingual", response_class=HTMLResponse, include_in_schema=False)
def multilingual_page(request: Request, atlas: ChosenAtlas, text: str = "", feature: int | None = None) -> HTMLResponse:
    """The report, and one feature of it in all its languages: the best, unless another is asked for."""
    view = multilingual(atlas)
    shown = [(t, f) for t in view.texts for f in t.features if f.examples]
    asked = [(t, f) for t, f in shown if text in ("", t.name) and feature in (None, f.feature)]
    if shown and not asked:
        raise NotFoundError(f"the report shows no feature {feature} of {text or 'any text'}")
    best = max(asked, key=lambda found: found[1].score - found[1].score_high, default=None)
    most = atlas.features.feature(best[1].feature).max_act if best else 0.0
    return page(request, "multilingual.html", dictionary=atlas.dictionary, view=view, shown=best, max_act=most)


def _report(atlas: Atlas, stage: str) -> Made:
    made = report_of(atlas.store, stage, atlas.dictionary)
    if made is None:
        raise NotFoundError(f"there is no {stage} report of {atlas.dictionary} as it is now: run `{_CURES[stage]}`")
    return made


def _named(atlas: Atlas, features: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same features, called what they are called now: labels may be written after a report."""
    return [feature | names(atlas, feature["feature"]) for feature in features]


def _json(made: Made, file: str) -> Any:
    return json.loads((made.folder / file).read_text("utf-8"))
