"""The JSON API: everything that the pages show, with its shape documented (`/api/openapi.json`)."""

from typing import Annotated

from fastapi import APIRouter, Depends, Request
from pydantic import Field

from sae_core.atlas import ExplainedToken
from sae_core.serve import shapes, views
from sae_core.serve.live import MAX_CHARACTERS, Live
from sae_core.serve.search import Question, found, question
from sae_core.serve.shelf import ChosenAtlas, Shelf

DESCRIPTION = """Everything that the pages show, as JSON.

`dictionary` is the name of a dictionary; left out, the newest finished one is meant. What a stage that is not made yet
would tell is null or empty. Errors are `{"detail": "what was wrong, and the cure"}`.
"""

router = APIRouter(prefix="/api", tags=["atlas"], responses={404: {"description": "There is no such thing."}})

Asked = Annotated[Question, Depends(question)]


class TextQuestion(shapes.View):
    """A text that the live model is to read."""

    text: str = Field(max_length=MAX_CHARACTERS)
    dictionary: str = ""
    feature: int | None = None
    """A feature whose value is wanted at each token."""
    per_token: int = Field(5, ge=0, le=50)
    """Features told for each token, the strongest first."""


@router.get("/dictionaries")
def dictionaries(request: Request) -> list[str]:
    """Names of the dictionaries that can be looked at."""
    shelf: Shelf = request.app.state.shelf
    return shelf.slugs()


@router.get("/overview")
def overview(request: Request, atlas: ChosenAtlas) -> shapes.Overview:
    """What an atlas is of, how good it is, and what it does not have yet."""
    shelf: Shelf = request.app.state.shelf
    return views.overview(atlas, shelf.slugs(), request.app.state.live.studies)


@router.get("/features/{dictionary}/{feature}")
def feature(atlas: ChosenAtlas, feature: int) -> shapes.FeatureView:
    """One feature with everything about it."""
    return views.feature_view(atlas, feature)


@router.get("/features/{dictionary}/{feature}/together")
def together(atlas: ChosenAtlas, feature: int) -> list[shapes.Together]:
    """Features that are seen at their strongest where this one fires, in the examples that are kept."""
    return views.together(atlas, feature)


@router.get("/search")
def search(atlas: ChosenAtlas, asked: Asked) -> shapes.SearchView:
    """Features by words, in labels, tokens and examples; or, without words, by filters alone."""
    return found(atlas, asked)


@router.get("/documents/{corpus}/{document}")
def document(request: Request, corpus: str, document: int) -> shapes.DocumentView:
    """A document of a corpus."""
    return views.document_view(request.app.state.shelf.store, corpus, document)


@router.post("/text", responses={503: {"description": "Too many texts at once."}, 504: {"description": "Too slow."}})
async def text(request: Request, asked: TextQuestion) -> list[ExplainedToken]:
    """For each token of a text, the features that fire most strongly on it; and what one feature does, if asked."""
    shelf: Shelf = request.app.state.shelf
    live: Live = request.app.state.live
    atlas = shelf.atlas(asked.dictionary)
    return await live.explain(request, atlas, asked.text, asked.per_token, asked.feature)
