"""The pages. Each can be read without JavaScript; what a page shows is also in the JSON API."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request
from starlette.responses import HTMLResponse

from sae_core.atlas import SORTS, ExplainedToken, Fired
from sae_core.features.reader import FeatureError
from sae_core.serve import views
from sae_core.serve.live import MAX_CHARACTERS, Live
from sae_core.serve.render import page
from sae_core.serve.search import Question, found, question
from sae_core.serve.shelf import ChosenAtlas, Shelf

router = APIRouter(default_response_class=HTMLResponse, include_in_schema=False)

Asked = Annotated[Question, Depends(question)]

_PER_TOKEN = 6  # features told for each token of a text
_STRONGEST = 20  # features told for a whole text


@router.get("/")
def overview(request: Request, atlas: ChosenAtlas) -> HTMLResponse:
    """What the atlas is of, how good it is, and what is missing."""
    shelf: Shelf = request.app.state.shelf
    view = views.overview(atlas, shelf.slugs(), request.app.state.live.studies)
    return page(request, "overview.html", view=view, dictionary=atlas.dictionary)


@router.get("/f/{dictionary}/{feature}")
def feature(request: Request, atlas: ChosenAtlas, feature: int) -> HTMLResponse:
    """One feature."""
    view = views.feature_view(atlas, feature)
    return page(request, "feature.html", view=view, dictionary=atlas.dictionary, max_characters=MAX_CHARACTERS)


@router.get("/f/{dictionary}/{feature}/together")
def together(request: Request, atlas: ChosenAtlas, feature: int) -> HTMLResponse:
    """Features that fire together with one."""
    found = views.together(atlas, feature)
    named = views.names(atlas, feature)
    return page(request, "together.html", named=named, found=found, dictionary=atlas.dictionary)


@router.get("/search")
def search(request: Request, atlas: ChosenAtlas, asked: Asked) -> HTMLResponse:
    """Features by words, filtered and sorted."""
    view = found(atlas, asked)
    more = request.url.include_query_params(offset=asked.offset + asked.limit)
    return page(
        request, "search.html", view=view, asked=asked, sorts=SORTS, dictionary=atlas.dictionary,
        has_scores=atlas.has_scores, query=request.query_params,
        more=f"/search?{more.query}",
    )  # fmt: skip


@router.get("/text")
async def text(request: Request, atlas: ChosenAtlas, text: str = "", feature: str = "") -> HTMLResponse:
    """Which features fire on a text, token by token; and where one feature does."""
    live: Live = request.app.state.live
    row = atlas.features.feature(_number(feature)) if feature.strip() else None
    number = row.feature if row else None
    tokens = await live.explain(request, atlas, text, _PER_TOKEN, number) if text.strip() else []
    return page(
        request, "text.html", text=text, tokens=tokens, strongest=_strongest(tokens), row=row,
        named=views.names(atlas, row.feature) if row else None, max_characters=MAX_CHARACTERS,
        dictionary=atlas.dictionary,
    )  # fmt: skip


@router.get("/d/{corpus}/{document}")
def document(
    request: Request, corpus: str, document: int, dictionary: str = "", feature: int | None = None, at: int = 0
) -> HTMLResponse:
    """A document of a corpus; with the example marked that a feature has at token `at`, if one is given."""
    shelf: Shelf = request.app.state.shelf
    view = views.document_view(shelf.store, corpus, document)
    marked = None if feature is None else views.marked(shelf.atlas(dictionary), view, feature, at)
    return page(request, "document.html", view=view, marked=marked, dictionary=dictionary)


def _number(feature: str) -> int:
    if not feature.strip().isdecimal():
        raise FeatureError(f"there is no feature {feature!r}: features have numbers")
    return int(feature)


def _strongest(tokens: list[ExplainedToken]) -> list[tuple[Fired, list[str]]]:
    """The features with the largest values in a text, and the tokens that they are told for."""
    largest: dict[int, Fired] = {}
    on: dict[int, list[str]] = {}
    for token in tokens:
        for fired in token.features:
            on.setdefault(fired.feature, []).append(token.token)
            if fired.feature not in largest or fired.value > largest[fired.feature].value:
                largest[fired.feature] = fired
    best = sorted(largest.values(), key=lambda fired: -fired.value)[:_STRONGEST]
    return [(fired, on[fired.feature]) for fired in best]
