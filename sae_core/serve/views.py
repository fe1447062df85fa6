"""What the pages show and the JSON API returns, gathered from the artifacts."""

import re
from collections.abc import Container
from dataclasses import asdict
from functools import lru_cache
from typing import Any

from sae_core.artifacts import ArtifactStore
from sae_core.atlas import Atlas, Filters
from sae_core.corpus import Corpus
from sae_core.display import shown_bytes
from sae_core.errors import MindAtlasError
from sae_core.features import Example, FeatureRow
from sae_core.labels.scoring.items import STRATA
from sae_core.names import DictionarySpec
from sae_core.serve.shapes import (
    DocumentView,
    FeatureView,
    Label,
    Level,
    Listed,
    Marked,
    Near,
    Overview,
    Passage,
    Quality,
    Score,
    Stage,
    Together,
)
from sae_core.serve.shelf import slug_of
from sae_core.stages import VERSIONS
from sae_core.studies import Studies


class NotFoundError(MindAtlasError):
    """Something asked for by number or name that is not there."""


_ON_REQUEST = {
    "steering_report": "mind-atlas steering-report", "safety": "mind-atlas audit",
    "multilingual": "mind-atlas multilingual", "behaviors": "mind-atlas behaviors",
}  # fmt: skip
"""Stages that are no part of an atlas, and the commands that make them."""
_HEALTH = ("fvu", "l0", "dead", "delta_ce", "ce_recovered")
_LISTED = 8
_COUNTER = 3  # counter-examples of each sort


def feature_view(atlas: Atlas, feature: int) -> FeatureView:
    """Everything about one feature. Raises FeatureError when there is no such feature."""
    card = atlas.feature(feature)
    n, written = len(atlas.features), (card.label or {}).get("label") or ""
    counter = atlas.counter_examples.of(card.row, card.examples, written, _COUNTER)
    return FeatureView(
        dictionary=atlas.dictionary,
        corpus=atlas.site.corpus,
        name=card.name,
        row=card.row,
        label=_label(card.label) if card.label else None,
        levels=_levels(atlas, card.row, card.examples, {*((card.label or {}).get("examples") or ())}),
        counter_examples=_passages(atlas, [*counter.silent, *counter.firing]),
        counter_by_label=counter.by_label,
        neighbors=[Near(**asdict(x)) for x in card.neighbors],
        cluster=card.place.cluster if card.place else None,
        output_score=(card.steering or {}).get("output_score"),
        suggested_strength=(card.steering or {}).get("suggested_strength"),
        role=(card.steering or {}).get("role") or "",
        history=card.history,
        previous=feature - 1 if feature else None,
        next=feature + 1 if feature + 1 < n else None,
    )


def _label(row: dict[str, Any]) -> Label:
    """The label, from its row; columns that are not there yet are passed over."""
    texts = ("label", "lexical", "description", "kind", "status", "model", "prompt_version", "made_at", "error")
    return Label(
        **{name: row.get(name) or "" for name in texts},
        confidence=row.get("confidence"),
        scores=[
            Score(
                name=s["scorer"],
                value=s["score"],
                control=s["shuffled"],
                **{name: s[name] for name in ("low", "high", "lexical", "failed", "n_firing", "n_silent", *STRATA)},
            )
            for s in row.get("scores") or []
            if s["score"] is not None
        ],
        beats_control=row.get("beats_control"),
    )


def _levels(atlas: Atlas, row: FeatureRow, examples: list[Example], shown: Container[int] = ()) -> list[Level]:
    """The examples by level, the highest first; levels without an example are left out.

    `shown` are the indices of those that the label's writer saw.
    """
    n_levels = int(atlas.store.get("features", atlas.dictionary).manifest.settings.get("levels", 0)) or max(
        (example.level for example in examples), default=1
    )
    passages = list(zip((x.level for x in examples), _passages(atlas, examples, shown), strict=True))
    return [
        Level(
            low=(level - 1) / n_levels,
            high=level / n_levels,
            share=row.share((level - 1) / n_levels, level / n_levels),
            examples=[passage for of, passage in passages if of == level],
        )
        for level in range(n_levels, 0, -1)
        if any(of == level for of, _ in passages)
    ]


def _passages(atlas: Atlas, examples: list[Example], shown: Container[int] = ()) -> list[Passage]:
    about = atlas.documents({example.document for example in examples})
    return [
        Passage(
            act=x.act, tokens=x.tokens, acts=x.acts, peak=x.peak, kind=x.kind, document=x.document,
            position=x.position, shown=i in shown,
            **about.get(x.document, {"source": "", "title": "", "language": ""}),
        )
        for i, x in enumerate(examples)
    ]  # fmt: skip


def document_view(store: ArtifactStore, corpus: str, document: int) -> DocumentView:
    """A document of a corpus. Raises NotFoundError when there is no such one."""
    if corpus not in store.slugs("corpus"):
        raise NotFoundError(f"no corpus {corpus!r}: there are {', '.join(store.slugs('corpus')) or 'none yet'}")
    try:
        row = Corpus.open(store.get("corpus", corpus).folder).document(document)
    except IndexError as error:
        raise NotFoundError(f"no document {document}: {error}") from None
    return DocumentView(corpus=corpus, **row)


def overview(atlas: Atlas, slugs: list[str], studies: Studies) -> Overview:
    """What the atlas is of, how good it is, and what is missing."""
    store, spec = atlas.store, DictionarySpec.parse(atlas.dictionary)
    summaries = {stage: _summary(store, stage, slug_of(spec, stage)) for stage in VERSIONS}
    order = studies.dictionaries.get(atlas.dictionary)
    study = order.study.name if order else ""
    return Overview(
        dictionary=atlas.dictionary,
        dictionaries=slugs,
        study=study,
        description=order.study.description if order else "",
        model=spec.site.model,
        hook=spec.site.hook,
        layer=spec.site.layer,
        architecture=spec.architecture,
        corpus=summaries["corpus"] or {},
        health={key: (summaries["dictionary"] or {})[key] for key in _HEALTH if key in (summaries["dictionary"] or {})},
        features=summaries["features"] or {},
        labels=summaries["labels"],
        quality=_quality(summaries["labels"] or {}),
        lists=_lists(atlas),
        stages=[
            *(_stage(store, stage, spec, f"mind-atlas run {study or 'STUDY'} --until {stage}") for stage in VERSIONS),
            *(_stage(store, stage, spec, cure, on_request=True) for stage, cure in _ON_REQUEST.items()),
        ],
    )


@lru_cache(4)
def _lists(atlas: Atlas) -> list[Listed]:
    """Lists of features worth a look; those that hold none are left out. Kept: some look at every example."""
    scored = "highest score first" if atlas.has_scores else "not scored yet"
    written = atlas.browse(_LISTED, Filters(written=True), "score" if atlas.has_scores else "strength")
    rare = atlas.browse(_LISTED, Filters(alive=True), "rarity")
    lists = [
        ("Labeled by a model", scored, written),
        ("Safety", "what the audit points to, concept by concept", atlas.safety(_LISTED)),
        ("Multilingual", "strongest examples spread over languages", atlas.multilingual(_LISTED)),
        ("Strongest", "largest activations", atlas.browse(_LISTED, sort="strength")),
        ("Always on", "fire on the most tokens", atlas.browse(_LISTED, sort="density")),
        ("Rare", "alive, on the fewest tokens", rare),
        ("Newest", "brought by the last retraining", atlas.newest(_LISTED)),
    ]
    return [Listed(title=title, about=about, features=hits) for title, about, hits in lists if hits]


def _summary(store: ArtifactStore, stage: str, slug: str) -> dict[str, Any] | None:
    manifest = store.manifest(stage, slug)
    return manifest.summary if manifest else None


def _quality(summary: dict[str, Any]) -> list[Quality]:
    """The scores of all labels, in the mean."""
    found = []
    for name, scores in (summary.get("scores") or {}).items():
        known = {key: [x for x in scores.get(key, []) if x is not None] for key in ("score", "shuffled", "lexical")}
        value, control, lexical = (sum(xs) / len(xs) if xs else None for xs in known.values())
        if value is not None:
            labels = len(known["score"])
            found.append(Quality(name=name, labels=labels, value=value, control=control, lexical=lexical))
    return found


def _stage(store: ArtifactStore, stage: str, spec: DictionarySpec, cure: str, on_request: bool = False) -> Stage:
    manifest = store.manifest(stage, slug_of(spec, stage))
    made_at = manifest.made_at if manifest else ""
    return Stage(stage=stage, made=manifest is not None, made_at=made_at, cure=cure, on_request=on_request)


def together(atlas: Atlas, feature: int) -> list[Together]:
    """Features seen with this one, the most often first. Raises FeatureError when there is no such feature."""
    atlas.features.feature(feature)
    return [Together(**names(atlas, i), tokens=n) for i, n in atlas.together(feature)]


def names(atlas: Atlas, feature: int) -> dict[str, Any]:
    """The fields of `Named`."""
    return {"feature": feature, "label": atlas.name(feature), "beats_control": atlas.beats_control(feature)}


def marked(atlas: Atlas, document: DocumentView, feature: int, position: int) -> Marked | None:
    """The feature's example with its peak at that token of the document; None when it has none there.

    Examples hold tokens, and documents text: the example is found in the text, at the occurrence nearest to its place.
    """
    card = atlas.feature(feature)
    passages = (x for level in _levels(atlas, card.row, card.examples) for x in level.examples)
    here = next((x for x in passages if (x.document, x.position) == (document.document, position)), None)
    whole = b"".join(map(shown_bytes, here.tokens)).decode("utf-8", "ignore") if here else ""
    if here is None or not whole:
        return None
    about = len(document.text) * position / max(document.n_tokens, 1)
    places = [found.start() for found in re.finditer(re.escape(whole), document.text)]
    if not places:
        return None
    start = min(places, key=lambda place: abs(place - about))
    return Marked(
        before=document.text[:start],
        after=document.text[start + len(whole) :],
        passage=here,
        dictionary=atlas.dictionary,
        max_act=card.row.max_act,
        **names(atlas, feature),
    )
